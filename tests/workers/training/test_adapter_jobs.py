"""Jobs with one adapter a stage in the real trainer: left and resumed, merged, published, exported again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.domain.configs.adapters import DomainAdaptersConfig
from app.domain.messages import EXIT_DONE, EXIT_RELEASED
from app.domain.runplan import ExportPlan, StagePlan
from tests.workers.training.rows import make_supervisor, write_rows
from tests.workers.training.runs import CPU, make_plan, make_training, same
from tests.workers.training.supervised import stop
from workers.evaluation.adapters import load_adapter
from workers.export.artifact import load_provenance
from workers.export.bottleneck import load_bottlenecks
from workers.training.models import load_base

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])
STEPS = 5  # a stage
NAMES = ("one", "two")


def make_job(scratch, config, **overrides):
    whole = make_training(type="lora", total_steps=2 * STEPS, learning_rate=1e-2)
    stages = tuple(
        StagePlan(
            name=name,
            training_rows=write_rows(scratch / f"{name}.jsonl", 24, seed),
            training=whole.model_copy(update={"total_steps": STEPS}),
        )
        for seed, name in enumerate(NAMES, 11)
    )
    return make_supervisor(
        scratch, training=whole.model_dump(), stages=stages, strategies=(config,), **overrides
    )


def base_model():
    return load_base(make_plan("unused").base, CPU, torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load_peft(directory):
    return load_adapter(base_model(), directory).eval()


def export_job(supervisor, config, scratch, alpha):
    plan = supervisor.plan
    supervisor.plan = ExportPlan(
        job_id="export",
        attempt=9,
        base=plan.base,
        checkpoint_directory=supervisor.checkpoints[0, 2 * STEPS],
        training=plan.training,
        strategies=(config,),
        stage_names=NAMES,
        alpha=alpha,
        benchmarks=plan.benchmarks,
        scratch_directory=str(scratch),
        cache_directory=plan.cache_directory,
    )
    supervisor.next_plan = lambda: supervisor.plan
    supervisor.attempt = 9
    assert supervisor.run_here() == EXIT_DONE
    (done,) = supervisor.of("export_finished")
    return Path(done.artifact_directory)


@pytest.mark.parametrize("merge", ["cat", "dare"])
def test_a_merged_job_publishes_one_adapter_and_an_export_makes_it_again(tmp_path, merge):
    config = DomainAdaptersConfig(r=4, merge=merge)
    supervisor = make_job(tmp_path, config, with_suite=False)
    assert supervisor.run_here() == EXIT_DONE
    assert "adapters_merged" in {m.code for m in supervisor.of("note")}
    assert "adapter_share" in {m.code for m in supervisor.of("note")}
    (finished,) = supervisor.of("finished")
    directory = Path(finished.artifact_directory)
    files = set(load_provenance(directory)["files"])
    assert {"routing.json", "routing.safetensors", "adapter_config.json"} <= files
    assert {f"{name}/adapter_model.safetensors" for name in (*NAMES, "merged")} <= files
    root = load_file(directory / "adapter_model.safetensors")
    assert same(root, load_file(directory / "merged" / "adapter_model.safetensors"))
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8
    assert finished.alpha == 1.0
    assert not torch.equal(logits(load_peft(directory)), logits(base_model()))

    half = load_file(export_job(supervisor, config, tmp_path, 0.5) / "adapter_model.safetensors")
    for name, value in root.items():
        assert torch.equal(half[name], value * 0.5 if "lora_B" in name else value)


@pytest.mark.parametrize("left_at", [STEPS, STEPS + 2])
def test_a_job_left_in_the_second_stage_ends_with_the_same_adapters(tmp_path, left_at):
    config = DomainAdaptersConfig(r=4, compose="stacked", strength=5.0)

    def leave(message):
        is_there = message.type == "progress" and message.step >= left_at
        return [stop("drain")] if is_there else None

    ends = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        supervisor = make_job(tmp_path / name, config, with_suite=name == "parts")
        if name == "parts":
            assert supervisor.run_here(send_at=leave) == EXIT_RELEASED
        assert supervisor.run_here() == EXIT_DONE
        ends.append(Path(supervisor.checkpoints[0, 2 * STEPS]))
    whole, parts = (load_file(end / "model.safetensors") for end in ends)
    assert same(parts, whole)
    states = [json.loads((end / "state.json").read_text())["strategies"] for end in ends]
    assert states[0] == states[1]
    centroids = [load_file(end / "strategy-domain_adapters.safetensors") for end in ends]
    assert centroids[0].keys() == {"centroid/one"}
    assert same(*centroids)


def test_bottlenecks_are_published_for_our_own_loader(tmp_path):
    config = DomainAdaptersConfig(kind="bottleneck", r=4)
    supervisor = make_job(tmp_path, config, with_suite=False)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.artifact_kind == "adapter"
    directory = Path(finished.artifact_directory)
    files = set(load_provenance(directory)["files"])
    assert {"bottleneck_config.json", "routing.json", "one/bottleneck.safetensors"} <= files
    loaded = load_bottlenecks(base_model(), directory).eval()
    assert loaded.active == ("two",)
    again = load_bottlenecks(base_model(), export_job(supervisor, config, tmp_path, 1.0)).eval()
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(base_model()))
