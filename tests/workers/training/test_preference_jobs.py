"""Whole attempts on pairs of answers against a scripted supervisor."""

import csv
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.domain.messages import EXIT_DONE, EXIT_RELEASED
from tests.workers.training.pairs import write_pairs
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import same
from tests.workers.training.supervised import stop


def make_pair_job(scratch, *, kind="full", **overrides):
    scratch.mkdir(exist_ok=True)
    return make_supervisor(
        scratch,
        training={
            "type": kind,
            "beta": 0.5,
            "learning_rate": 3e-3 if kind == "full" else 1e-2,
            **overrides.pop("training", {}),
        },
        training_rows=write_pairs(scratch / "pairs.jsonl", 40, 1),
        validation_rows=write_pairs(scratch / "held_out.jsonl", 12, 3),
        **overrides,
    )


def last_weights(supervisor):
    return load_file(f"{supervisor.checkpoints[0, 12]}/model.safetensors")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_job_of_pairs_runs_to_a_published_model(tmp_path, kind):
    supervisor = make_pair_job(tmp_path, kind=kind)
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    assert finished.artifact_kind == ("adapter" if kind == "lora" else "full")
    assert finished.artifact_directory is not None
    # The line starts at the model that the pairs are held to.
    assert finished.frontier[0].valid_loss == pytest.approx(math.log(2), abs=1e-5)
    assert finished.frontier[-1].valid_loss == pytest.approx(finished.valid_loss, rel=1e-5)
    looks = supervisor.of("evaluated")
    assert [look.step for look in looks] == [4, 8, 12]
    assert looks[-1].valid_loss < 0.6 < math.log(2)
    assert looks[-1].values["valid_reward_margin"] > looks[0].values["valid_reward_margin"]
    assert looks[-1].values["valid_reward_accuracy"] == 1.0
    assert len(looks[-1].scores) == 2  # the general benchmarks are watched all the while
    metrics = supervisor.of("checkpoint_saved")[-1].metrics
    assert metrics["train_reward_accuracy"] > 0.5
    assert metrics["valid_reward_margin"] == looks[-1].values["valid_reward_margin"]
    with Path(finished.result_csv).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(rows[-1]["train_reward_margin"]) > 0
    assert float(rows[-1]["valid_reward_accuracy"]) == 1.0
    assert "reference" in {message.phase for message in supervisor.of("progress")}
    assert finished.measured is None or finished.measured.rows >= 2 * finished.measured.steps


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_a_stop_saves_and_a_resume_goes_on_bit_identically(tmp_path, keeps_cache):
    whole = make_pair_job(tmp_path / "a")
    assert whole.run_here() == EXIT_DONE
    halved = make_pair_job(tmp_path / "b")

    def send_after(message):
        is_time = message.type == "evaluated" and message.step == 4
        return [stop("drain")] if is_time else None

    assert halved.run_here(send_after=send_after) == EXIT_RELEASED
    if not keeps_cache:
        shutil.rmtree(tmp_path / "b" / "cache")
    assert halved.run_here() == EXIT_DONE
    assert same(last_weights(whole), last_weights(halved))
    losses = [look.valid_loss for look in whole.of("evaluated")]
    assert [look.valid_loss for look in halved.of("evaluated")] == losses
