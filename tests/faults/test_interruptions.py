"""Exact resume: a run that is interrupted at random, in this process, ends as if nothing had happened."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app.domain.configs.quadratic import EwcConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.messages import EXIT_DONE
from app.errors import TrainingFailed
from tests.faults.fleet import measured
from tests.workers.training.rows import make_supervisor
from tests.workers.training.runs import same
from tests.workers.training.supervised import Supervisor, stop
from workers.training.loop import train_step

STRATEGIES = (EwcConfig(fisher_samples=16), ReplayConfig(strength=0.25))
PER_RUN = 10  # interruptions


def rolling_back(supervisor: Supervisor, message: Any) -> dict[str, Any]:
    """At step 8 of the first branch: back to step 4 with more strength and a lower rate."""
    if (message.branch, message.step) != (0, 8):
        return {}
    state = supervisor.last_state()
    changes = {
        "strengths": {**state.strengths, "ewc": 400.0, "replay": 0.4},
        "learning_rate_scale": 0.5,
        "branch": 1,
        "rollbacks": 1,
    }
    return {
        "action": "roll_back",
        "state": state.model_copy(update=changes),
        "roll_back": supervisor.to_checkpoint(0, 4),
    }


def make(scratch: Path) -> Supervisor:
    scratch.mkdir(parents=True)
    training = {"total_steps": 12, "checkpoint_interval": 2}
    supervisor: Supervisor = make_supervisor(
        scratch, strategies=STRATEGIES, decide=rolling_back, training=training
    )
    return supervisor


def outcome(supervisor: Supervisor) -> dict[str, Any]:
    """Decisions, evaluations and the loss curve; the weights are compared apart."""
    last = Path(supervisor.checkpoints[1, 12])
    history = json.loads((last / "state.json").read_text())["history"]
    evaluated = {(m.branch, m.step): m for m in supervisor.of("evaluated")}
    return {
        "curve": [{k: v for k, v in row.items() if k != "seconds"} for row in history],
        "decisions": {
            key: (reply.action, reply.state.model_dump(mode="json"))
            for key, reply in supervisor.decisions.items()
        },
        "evaluated": {
            key: (m.valid_loss, [s.scores for s in m.scores], m.carry.model_dump(mode="json"))
            for key, m in evaluated.items()
        },
    }


def weights(supervisor: Supervisor) -> dict[str, Any]:
    return load_file(f"{supervisor.checkpoints[1, 12]}/model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Supervisor:
    supervisor = make(tmp_path_factory.mktemp("undisturbed") / "job")
    assert supervisor.run_here() == EXIT_DONE
    return supervisor


def stop_after(messages: int) -> Any:
    """Told to leave after so many messages."""
    left = iter(range(messages, -1, -1))
    return lambda _: [stop("drain")] if next(left, -1) == 0 else []


def dying_after(steps: int) -> Any:
    """A step that breaks after so many; nothing more is saved."""
    left = [steps]

    def step_on(run: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise TrainingFailed("interrupted")
        return train_step(run)

    return step_on


def interrupt(supervisor: Supervisor, dice: random.Random) -> Iterator[str]:
    """Attempts with an interruption each, at most so many, and one without; how each was interrupted."""
    for _ in range(PER_RUN):
        with pytest.MonkeyPatch.context() as patch:
            if dice.random() < 0.5:
                code = supervisor.run_here(send_after=stop_after(dice.randrange(12)))
                kind = "stopped"
            else:
                step_on = dying_after(dice.randrange(5))
                patch.setattr("workers.training.flow.train_step", step_on)
                code, kind = supervisor.run_here(), "broken"
        if code == EXIT_DONE:
            return
        yield kind
    assert supervisor.run_here() == EXIT_DONE


def check_interrupted(tmp_path: Path, undisturbed: Supervisor, least: int, seed: int) -> None:
    dice, counts, runs = random.Random(seed), {"stopped": 0, "broken": 0}, 0
    expected = outcome(undisturbed)
    while sum(counts.values()) < least:
        runs += 1
        supervisor = make(tmp_path / f"run-{runs}")
        for kind in interrupt(supervisor, dice):
            counts[kind] += 1
        assert outcome(supervisor) == expected, (seed, runs)
        assert same(weights(supervisor), weights(undisturbed))
        shutil.rmtree(tmp_path / f"run-{runs}")
    measured("exact resume, in process", runs=runs, **counts, runs_that_differ=0)


def test_a_stop_right_after_a_rollback_costs_no_look(tmp_path: Path, undisturbed: Supervisor):
    """What is saved then lies at an evaluated step, on a branch that has not begun: nothing is evaluated again."""
    supervisor = make(tmp_path / "job")

    def is_rollback(message: Any) -> bool:
        return message.type == "evaluated" and (message.branch, message.step) == (0, 8)

    stopped = supervisor.run_here(send_after=lambda m: [stop("drain")] if is_rollback(m) else [])
    assert stopped != EXIT_DONE
    assert max(supervisor.checkpoints) == (1, 4)
    assert supervisor.run_here() == EXIT_DONE
    assert outcome(supervisor) == outcome(undisturbed)
    assert same(weights(supervisor), weights(undisturbed))


@pytest.mark.slow
def test_a_run_interrupted_anywhere_ends_bit_identically(tmp_path: Path, undisturbed: Supervisor):
    check_interrupted(tmp_path, undisturbed, 30, seed=1)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_runs_interrupted_three_hundred_times_end_bit_identically(
    tmp_path: Path, undisturbed: Supervisor
):
    check_interrupted(tmp_path, undisturbed, 300, seed=2)
