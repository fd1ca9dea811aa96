"""Exact resume with real workers and trainers: killed at random points, a run ends as if nothing had been."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app.db.models import Checkpoint, DecisionRow, JobEvent
from app.domain.configs.replay import ReplayConfig
from app.embedded import Endpoints
from tests.end_to_end.stack import Stack, forgetting, running_stack, trainers
from tests.faults.fleet import measured

TOTAL_STEPS, INTERVAL, SAVED_EVERY = 40, 10, 4
JOBS, KILLS_PER_JOB = 6, 5
#: What an undisturbed run lacks, and what only the job has that measures the base model's baseline for all.
NOT_COMPARED = {"claimed", "crashed", "released", "checkpoint_damaged", "sensor_power"}

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        # Kills may fall close together, before anything new was saved.
        patch.setenv("RETAIN_MAX_CRASHES", "100")
        with running_stack(servers, template_url, tmp_path_factory.mktemp("resume")) as stack:
            yield stack


def submit(stack: Stack) -> UUID:
    """Forgets at once, is rolled back with more strength, then holds; replayed rows beside its own all along."""
    spec = forgetting(
        stack.benchmark,
        ReplayConfig(strength=0.1),
        total_steps=TOTAL_STEPS,
        interval=INTERVAL,
        saved_every=SAVED_EVERY,
    )
    return stack.submit(spec)


def told(stack: Stack, job_id: UUID) -> list[tuple[Any, ...]]:
    """What the job's owner reads of the run itself, each thing once: a resumed attempt repeats its first steps."""
    found = []
    for event in stack.rows(JobEvent, job_id):
        data = event.data or {}
        if data.get("code") in NOT_COMPARED or "status" in data:
            continue
        keys = ("code", "branch", "step", "train_loss", "valid_loss", "action", "verdict")
        found.append((event.type, *(data.get(key) for key in keys)))
    return sorted(dict.fromkeys(found), key=str)


def outcome(stack: Stack, job_id: UUID) -> dict[str, Any]:
    return {**stack.outcome(job_id), "told": told(stack, job_id)}


@pytest.fixture(scope="module")
def reference(stack: Stack) -> dict[str, Any]:
    """The outcome of a run that nothing happened to."""
    job_id = submit(stack)
    found = outcome(stack, job_id)
    actions = [d.action for d in stack.rows(DecisionRow, job_id)]
    assert actions[0] == "roll_back"
    assert found["losses"][-1][0] == str(TOTAL_STEPS)
    return found


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Nothing differs, bit for bit; what does is named."""
    told, untold = set(found["told"]), set(expected["told"])
    assert (sorted(untold - told, key=str), sorted(told - untold, key=str)) == ([], [])
    assert found == expected


def place(stack: Stack, job_id: UUID) -> int:
    """How far a run is, over all branches."""
    job = stack.job(job_id)
    return job.branch * 1000 + job.step


def test_thirty_kills_at_random_points_change_nothing(stack: Stack, reference: dict[str, Any]):
    dice = random.Random(4)
    points = [
        *range(INTERVAL + 1),  # before the rollback
        *(1000 + step for step in range(TOTAL_STEPS)),
    ]
    jobs = {submit(stack): sorted(dice.sample(points, KILLS_PER_JOB)) for _ in range(JOBS)}
    kills: dict[UUID, int] = dict.fromkeys(jobs, 0)
    stack.start("worker-2")

    def kill_due() -> bool:
        for job_id, due in jobs.items():
            alive = trainers(job_id) if due and place(stack, job_id) >= due[0] else []
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            if alive:
                kills[job_id] += 1
                due.pop(0)
        return all(stack.job(job_id).state.is_terminal for job_id in jobs)

    stack.wait(kill_due, "all of them end", seconds=1200)
    for job_id in jobs:
        check_same(outcome(stack, job_id), reference)
        stack.check_history(job_id, attempts=1 + kills[job_id])
        assert len([d for d in stack.rows(DecisionRow, job_id) if d.action == "roll_back"]) == 1
    assert sum(kills.values()) >= JOBS * KILLS_PER_JOB - JOBS  # a run may end before its last
    measured("exact resume, kill -9", jobs=JOBS, kills=sum(kills.values()), runs_that_differ=0)


def test_f20_torn_flipped_and_unlisted_checkpoints_cost_steps_and_change_nothing(
    stack: Stack, reference: dict[str, Any]
):
    """And the worker that goes on has the store alone: the first one's disk is gone."""
    job_id = submit(stack)
    stack.saves(job_id, 24)
    for name in [name for name in stack.processes if name.startswith("worker")]:
        stack.processes[name].kill()
        stack.processes.pop(name).wait()
    shutil.rmtree(stack.settings.scratch_root)
    root = Path(stack.settings.storage_root)
    rows = [c for c in stack.rows(Checkpoint, job_id) if c.deleted_at is None and not c.superseded]
    newest = [row for row in rows if row.branch == 1][-2:]
    for row, name in zip(newest, ("model.safetensors", "optimizer.safetensors"), strict=True):
        path = root / row.path / name
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if row is newest[-1] else content[:-1])
    stack.start("worker")
    check_same(outcome(stack, job_id), reference)
    stack.check_history(job_id, attempts=2)
    assert [
        c.corrupt for c in stack.rows(Checkpoint, job_id) if c.id in {r.id for r in newest}
    ] == [
        True,
        True,
    ]
    job = stack.job(job_id)
    assert job.run_plan is not None
    resumed_at = job.run_plan["resume"]["step"]
    assert resumed_at < newest[0].step
    measured("F20, real trainer", damaged=2, scratch="deleted", resumed_at=resumed_at)
