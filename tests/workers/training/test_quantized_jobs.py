"""Whole attempts on a quantised base against a scripted supervisor: adapters, merged models, stops and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.domain.benchmarks import unpack_array
from app.domain.messages import EXIT_DONE, EXIT_RELEASED
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import CPU, same
from tests.workers.training.supervised import stop
from workers.training.models import load_base

TRAINING = {"type": "lora", "learning_rate": 0.02}


def make_job(scratch, kind="nf4", *, over_root=True, **overrides):
    scratch.mkdir(exist_ok=True)
    training = TRAINING | {"quantization": kind}
    supervisor = make_supervisor(scratch, training=training, **overrides)
    base = supervisor.plan.base.quantized(kind).model_copy(update={"is_over_root": over_root})
    supervisor.plan = supervisor.plan.model_copy(update={"base": base})
    return supervisor


def last_weights(supervisor):
    return load_file(f"{supervisor.checkpoints[0, 12]}/model.safetensors")


def values(scores):
    found = unpack_array(scores.scores)
    return found[np.isfinite(found)]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_job_publishes_adapters_that_say_what_they_were_trained_on(tmp_path, kind):
    supervisor = make_job(tmp_path / kind, kind)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert (finished.artifact_kind, finished.merged_baseline) == ("adapter", ())
    record = json.loads(Path(finished.artifact_directory, "retain.json").read_text())
    assert (record["kind"], record["quantization"]) == ("adapter", kind)
    assert len(finished.frontier) == 11
    assert finished.frontier[-1].valid_loss == pytest.approx(finished.valid_loss)


def test_whole_weights_are_merged_from_the_whole_base_and_measured_again(tmp_path):
    supervisor = make_job(tmp_path / "job", over_root=False)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.artifact_kind == "full"
    directory = Path(finished.artifact_directory)
    base = supervisor.plan.base.quantized("none")
    whole = dict(load_base(base, CPU, torch.float32).named_parameters())
    published = load_base(
        base.model_copy(update={"directory": str(directory)}), CPU, torch.float32
    ).state_dict()
    adapter, scale = last_weights(supervisor), 8.0 / 4
    checked = 0
    for name, weight in whole.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        change = torch.zeros(())
        if f"{key}.lora_A.default.weight" in adapter:
            checked += 1
            factors = (adapter[f"{key}.lora_{side}.default.weight"] for side in "BA")
            left, right = factors
            change = scale * left @ right
        torch.testing.assert_close(published[name], weight.detach() + change)
    assert checked
    assert json.loads((directory / "retain.json").read_text())["quantization"] == "nf4"
    pairs = zip(finished.report, finished.tuned_report, finished.merged_baseline, strict=True)
    for merged, quantized, beside in pairs:
        assert merged.item_set == beside.item_set == "report"
        assert values(merged).size == values(quantized).size == values(beside).size
    assert finished.report != finished.tuned_report
    # the run's own baselines are those of the quantised base
    (own,) = [
        m.scores[0]
        for m in supervisor.of("baseline_measured")
        if "text" in m.scores[0].benchmark_version_id
    ]
    (other,) = [s for s in finished.merged_baseline if "text" in s.benchmark_version_id]
    mine, theirs = unpack_array(own.scores), unpack_array(other.scores)
    assert not np.isclose(mine, theirs)[np.isfinite(theirs)].all()
    (note,) = [m for m in supervisor.of("note") if m.code == "merged_into_whole"]
    assert note.data["quantized"].keys() == note.data["merged"].keys() == {"choice", "text"}
    assert note.data["merged"]["text"] != note.data["quantized"]["text"]


def test_a_stop_saves_and_a_resume_goes_on_bit_identically(tmp_path):
    whole = make_job(tmp_path / "a")
    assert whole.run_here() == EXIT_DONE
    halved = make_job(tmp_path / "b")

    def send_after(message):
        is_time = message.type == "evaluated" and message.step == 4
        return [stop("drain")] if is_time else None

    assert halved.run_here(send_after=send_after) == EXIT_RELEASED
    assert halved.run_here() == EXIT_DONE
    assert same(last_weights(whole), last_weights(halved))
    looks = [[look.scores for look in s.of("evaluated")] for s in (whole, halved)]
    assert looks[0] == looks[1]
