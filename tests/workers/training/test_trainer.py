"""The trainer as a process: killed at several points and resumed, on one rank and on two."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.domain.configs.quadratic import EwcConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.messages import EXIT_DONE, EXIT_FAILED
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import same
from tests.workers.training.supervised import ROOT, SIGKILLED

STRATEGIES = (EwcConfig(fisher_samples=16), ReplayConfig(strength=0.25))


def rolling_back(supervisor, message):
    """At step 8 of the first branch: back to step 4 with more strength and a lower rate."""
    if (message.branch, message.step) != (0, 8):
        return {}
    state = supervisor.last_state()
    raised = state.model_copy(
        update={
            "strengths": {**state.strengths, "ewc": 400.0},
            "learning_rate_scale": 0.5,
            "branch": 1,
            "rollbacks": 1,
        }
    )
    return {"action": "roll_back", "state": raised, "roll_back": supervisor.to_checkpoint(0, 4)}


def final_weights(supervisor):
    return load_file(f"{supervisor.checkpoints[1, 12]}/model.safetensors")


def make(scratch, **overrides):
    scratch.mkdir()
    return make_supervisor(scratch, strategies=STRATEGIES, decide=rolling_back, **overrides)


def at(kind, step, branch=None):
    """True for the first message of a type at or after a step."""

    def matches(message):
        is_branch = branch is None or getattr(message, "branch", None) == branch
        return message.type == kind and is_branch and getattr(message, "step", 0) >= step

    return matches


FEW = (
    at("evaluated", 8),  # the rollback is recorded only by the next attempt
    at("progress", 5, branch=1),
)
MANY = (
    at("baseline_measured", 0),
    at("checkpoint_saved", 0),  # saved, never registered
    at("progress", 1),
    at("evaluated", 4),  # its decision is never made
    at("checkpoint_saved", 8),
    at("checkpoint_saved", 8, branch=1),
    at("evaluated", 12),
    at("finished", 0),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same job, never killed, in this process."""
    supervisor = make(tmp_path_factory.mktemp("undisturbed") / "job")
    assert supervisor.run_here() == EXIT_DONE
    return supervisor


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine processes, each some seconds to start, more on a busy machine
@pytest.mark.parametrize("kills", [FEW, MANY], ids=["few", "many"])
def test_a_job_killed_again_and_again_ends_with_the_same_weights(tmp_path, undisturbed, kills):
    supervisor = make(tmp_path / "job")
    for kill in kills:
        assert supervisor.spawn(kill_at=kill) == SIGKILLED, supervisor.log()
    assert supervisor.spawn() == EXIT_DONE, supervisor.log()
    assert same(final_weights(supervisor), final_weights(undisturbed))
    evaluated = {(m.branch, m.step): m for m in supervisor.of("evaluated")}
    for message in undisturbed.of("evaluated"):
        again = evaluated[message.branch, message.step]
        assert again.scores == message.scores
        assert again.valid_loss == message.valid_loss
        assert again.carry == message.carry
    fisher = [m for m in supervisor.of("progress") if m.phase == "fisher"]
    assert len(fisher) <= 2 + (kills is MANY)  # again only when step 0 was never registered


def test_help_needs_no_torch(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "workers.training.trainer", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--socket" in done.stdout
    assert " torch" not in done.stderr
    assert time.monotonic() - started < 20


def test_rows_that_cannot_be_read_fail_the_job_with_their_line(tmp_path):
    supervisor = make_supervisor(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + '{"text": 7}\n')
    assert supervisor.run_here() == EXIT_FAILED
    (failed,) = supervisor.of("failed")
    assert failed.param == "training_file"
    assert "41" in failed.message


def test_the_trainer_dies_when_its_supervisor_hangs_up(tmp_path):
    supervisor = make_supervisor(tmp_path)
    seen = []

    def hang_up(message):
        seen.append(message.type)
        return message.type == "baseline_measured"

    # `kill_at` without a kill: the socket is closed, the process left alone
    assert supervisor.spawn(kill_at=hang_up, kill=lambda: None) == 1
    assert "baseline_measured" in seen


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_killed_and_resumed_end_with_the_same_weights(tmp_path):
    plain = make(tmp_path / "plain", num_processes=2)
    assert plain.spawn() == EXIT_DONE, plain.log()
    killed = make(tmp_path / "killed", num_processes=2)
    for kill in (at("progress", 5), at("evaluated", 8), at("evaluated", 12)):
        assert killed.spawn(kill_at=kill) != EXIT_DONE
    assert killed.spawn() == EXIT_DONE, killed.log()
    assert same(final_weights(killed), final_weights(plain))
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if _is_ours(pid, tmp_path)]


def _is_ours(process, scratch):
    try:
        return str(scratch).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False  # it ended meanwhile
