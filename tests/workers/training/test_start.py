"""A job that goes on from a version or a checkpoint: its starting model, and what it publishes."""

import json
from pathlib import Path

import pytest
import torch

from app.domain.runplan import BasePlan, LayerPlan
from app.domain.spec import LoraConfig
from app.errors import TrainingFailed
from tests.tiny import make_tokenizer
from tests.workers.training.runs import CPU, make_plan, make_run, tiny_base
from workers.evaluation.adapters import load_adapter
from workers.export.adapter_files import join_adapters
from workers.training.checkpoints import save_checkpoint
from workers.training.exporting import artifact_kind, write_artifact
from workers.training.loop import train_step
from workers.training.models import load_base
from workers.training.ranks import Ranks
from workers.training.start import write_start

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])
ROOT = "1" * 64


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(plan, steps=3):
    """A run some steps on, which moved its model well off its start."""
    run = make_run(plan)
    for _ in range(steps):
        train_step(run)
    return run


def lora_plan(scratch, base=None, *, seed=7, **lora):
    config = LoraConfig(**{"r": 4, "alpha": 8.0} | lora)
    training = {"type": "lora", "learning_rate": 0.05, "seed": seed, "lora": config}
    plan = make_plan(scratch, training=training)
    return plan if base is None else plan.model_copy(update={"base": base})


def publish(plan, run, directory):
    run.model.eval()
    write_artifact(plan, run.model, make_tokenizer(), directory, alpha=1.0)
    return directory


def load_published(directory):
    base = load_base(make_plan("unused").base, CPU, torch.float32)
    return load_adapter(base, directory)


def start_plan(*layers, **changes):
    plan = BasePlan(
        name="tiny",
        directory=str(tiny_base()),
        sha256="2" * 64,
        default_template=True,
        layers=layers,
        root_sha256=ROOT,
    )
    return plan.model_copy(update=changes)


def adapter(directory):
    return LayerPlan(kind="adapter", directory=str(directory))


@pytest.fixture
def first(tmp_path):
    """A published adapter with what it computes."""
    plan = lora_plan(tmp_path)
    run = trained(plan)
    return publish(plan, run, tmp_path / "first"), logits(run.model)


def test_a_job_starts_where_the_adapter_left_off(tmp_path, first):
    directory, told = first
    base = write_start(start_plan(adapter(directory)), tmp_path / "start", Ranks())
    start = load_base(base, CPU, torch.float32)
    assert not hasattr(start, "peft_config")
    torch.testing.assert_close(logits(start), told, rtol=1e-5, atol=1e-6)
    assert (
        logits(start) - logits(load_base(make_plan("u").base, CPU, torch.float32))
    ).abs().max() > 0.01


def test_what_it_publishes_is_one_adapter_of_the_registered_base(tmp_path, first):
    base = write_start(start_plan(adapter(first[0])), tmp_path / "start", Ranks())
    plan = lora_plan(tmp_path, base, seed=8, r=3, target_modules=("q_proj", "up_proj"))
    run = trained(plan)
    told = logits(run.model)
    assert artifact_kind(plan) == "adapter"
    second = publish(plan, run, tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    torch.testing.assert_close(logits(load_published(second)), told, rtol=1e-4, atol=1e-5)
    provenance = json.loads((second / "retain.json").read_text())
    assert provenance["base_sha256"] == ROOT
    # and a third job goes on from there
    third = write_start(start_plan(adapter(second)), tmp_path / "third", Ranks())
    torch.testing.assert_close(
        logits(load_base(third, CPU, torch.float32)), told, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_job_starts_from_a_checkpoint(tmp_path, kind):
    plan = lora_plan(tmp_path) if kind == "lora" else make_plan(tmp_path)
    run = trained(plan)
    saved = save_checkpoint(run, tmp_path / "saved", 1)
    layer = LayerPlan(kind="checkpoint", directory=str(saved.directory), training=plan.training)
    base = write_start(start_plan(layer), tmp_path / "start", Ranks())
    torch.testing.assert_close(
        logits(load_base(base, CPU, torch.float32)), logits(run.model), rtol=1e-5, atol=1e-6
    )
    again = lora_plan(tmp_path, base, seed=9)
    on = trained(again)
    told = logits(on.model)
    artifact = publish(again, on, tmp_path / "artifact")
    if kind == "lora":
        torch.testing.assert_close(logits(load_published(artifact)), told, rtol=1e-4, atol=1e-5)
    else:
        assert artifact_kind(again) == "full"
        own = base.model_copy(update={"directory": str(artifact)})
        torch.testing.assert_close(
            logits(load_base(own, CPU, torch.float32)), told, rtol=1e-4, atol=1e-5
        )


def test_adapters_over_whole_weights_are_published_merged(tmp_path):
    plan = make_plan(tmp_path)
    full = publish(plan, trained(plan), tmp_path / "full")
    base = start_plan(directory=str(full), is_over_root=False)
    again = lora_plan(tmp_path, base)
    run = trained(again)
    artifact = publish(again, run, tmp_path / "artifact")
    assert artifact_kind(again) == "full"
    assert not (artifact / "adapter_config.json").exists()
    own = base.model_copy(update={"directory": str(artifact)})
    torch.testing.assert_close(
        logits(load_base(own, CPU, torch.float32)), logits(run.model), rtol=1e-4, atol=1e-5
    )


def test_the_start_is_written_to_the_same_bytes_by_every_attempt(tmp_path, first):
    written = []
    for attempt in ("a", "b"):
        base = write_start(start_plan(adapter(first[0])), tmp_path / attempt, Ranks())
        written.append((Path(base.directory) / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_only_plain_adapters_are_joined(tmp_path, first):
    config = json.loads((first[0] / "adapter_config.json").read_text())
    (first[0] / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(TrainingFailed, match="plain LoRA") as told:
        join_adapters(first[0], [first[0]])
    assert told.value.code == "not_joinable"
