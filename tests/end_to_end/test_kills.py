"""Real workers, trainers, Postgres and Redis: whatever is killed, the run ends as if nothing had been.

The job under test forgets at once and is rolled back to its start, then holds; an uninterrupted run of the same
job says what the others have to end with, bit for bit.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.db.models import (
    Checkpoint,
    DecisionRow,
    ModelVersion,
    Worker,
)
from app.db.session import transaction
from app.domain.requests import PublishPoint
from app.domain.states import JobState
from app.embedded import Endpoints
from app.services.control import request_cancel, request_pause, resume_job
from app.services.registry import publish_point
from app.services.storage import Storage
from tests.end_to_end.stack import Stack, forgetting, running_stack, trainers

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 10  # steps between evaluations
SAVED_EVERY = 5  # steps between checkpoints
TOTAL_STEPS = 40

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def stack(
    servers: Endpoints, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with running_stack(servers, template_url, tmp_path_factory.mktemp("kills")) as stack:
        yield stack


def submit(stack: Stack) -> UUID:
    spec = forgetting(
        stack.benchmark,
        total_steps=TOTAL_STEPS,
        interval=INTERVAL,
        saved_every=SAVED_EVERY,
    )
    return stack.submit(spec)


@pytest.fixture(scope="module")
def reference(stack: Stack) -> dict[str, Any]:
    """The outcome of a run that nothing happened to."""
    job_id = submit(stack)
    outcome = stack.outcome(job_id)
    assert [(step, action) for _, step, action, _ in outcome["decisions"]][:1] == [
        (INTERVAL, "roll_back")
    ]
    assert outcome["decisions"][-1][:2] == (1, TOTAL_STEPS)
    return outcome


def test_a_trainer_killed_mid_step_costs_at_most_one_interval(
    stack: Stack, reference: dict[str, Any]
):
    job_id = submit(stack)
    killed_after = stack.saves(job_id, 20)
    [pid] = trainers(job_id)
    os.kill(pid, signal.SIGKILL)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)
    job = stack.job(job_id)
    assert job.run_plan is not None
    assert job.run_plan["resume"]["branch"] == 1
    assert job.run_plan["resume"]["step"] >= killed_after.step
    assert job.crashes_without_progress == 0  # forgiven by the checkpoints that followed


@pytest.mark.slow
def test_a_trainer_killed_around_a_rollback_rolls_back_once(
    stack: Stack, reference: dict[str, Any]
):
    job_id = submit(stack)
    stack.wait(
        lambda: [d for d in stack.rows(DecisionRow, job_id) if d.action == "roll_back"],
        "the rollback",
    )
    for pid in trainers(job_id):
        os.kill(pid, signal.SIGKILL)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)
    left = [c for c in stack.rows(Checkpoint, job_id) if c.branch == 0 and c.step > 0]
    assert left
    assert all(checkpoint.superseded for checkpoint in left)


@pytest.mark.slow
def test_a_killed_worker_takes_its_trainer_along_and_another_goes_on(
    stack: Stack, reference: dict[str, Any]
):
    job_id = submit(stack)
    stack.saves(job_id, 15)
    pids = trainers(job_id)
    worker = stack.processes["worker"]
    worker.kill()
    worker.wait()
    died = time.monotonic()
    stack.wait(lambda: not any(is_alive(pid) for pid in pids), "the trainer is gone")
    assert time.monotonic() - died < 2
    stack.start("worker")
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)


def test_a_drained_worker_saves_and_the_next_goes_on(stack: Stack, reference: dict[str, Any]):
    job_id = submit(stack)
    stack.saves(job_id, 15)
    worker = stack.processes["worker"]
    worker.terminate()
    assert worker.wait(60) == 0
    job = stack.job(job_id)
    assert (job.state, job.crashes_without_progress) == (JobState.QUEUED, 0)
    saved = next(c for c in stack.rows(Checkpoint, job_id) if c.id == job.ckpt_id)
    assert saved.step == job.step >= 15  # nothing was lost
    stack.start("worker")
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)


@pytest.mark.slow
def test_pause_then_resume_and_cancel(stack: Stack, reference: dict[str, Any]):
    job_id = submit(stack)
    stack.saves(job_id, 15)
    project_id = stack.ids["project"]
    with transaction(stack.factory) as session:
        request_pause(session, project_id=project_id, job_id=job_id)
    stack.wait(lambda: stack.job(job_id).state is JobState.PAUSED, "paused")
    assert stack.job(job_id).step >= 15
    with transaction(stack.factory) as session:
        resume_job(session, project_id=project_id, job_id=job_id)
    assert stack.outcome(job_id) == reference
    stack.check_history(job_id, attempts=2)

    cancelled_id = submit(stack)
    stack.saves(cancelled_id, 0, branch=0)
    with transaction(stack.factory) as session:
        request_cancel(session, project_id=project_id, job_id=cancelled_id)
    assert stack.ends(cancelled_id).state is JobState.CANCELLED
    stack.wait(lambda: not trainers(cancelled_id), "its trainer is gone")
    stack.check_history(cancelled_id, attempts=1)


@pytest.mark.slow
def test_a_point_of_a_finished_run_is_exported_though_its_trainer_is_killed(
    stack: Stack, reference: dict[str, Any]
):
    job_id = submit(stack)
    stack.outcome(job_id)
    with transaction(stack.factory) as session:
        asked = publish_point(session, stack.ids["project"], job_id, PublishPoint(alpha=0.5))
        version_id, export_id = asked[0].row.id, asked[1].id
    [pid] = stack.wait(lambda: trainers(export_id), "its trainer")
    os.kill(pid, signal.SIGKILL)
    export = stack.ends(export_id)
    assert (export.state, export.attempt) == (JobState.SUCCEEDED, 2), export.error
    with transaction(stack.factory) as session:
        version = session.get_one(ModelVersion, version_id)
    assert (version.status, version.alpha, version.kind) == ("ready", 0.5, "full")
    assert version.verdict is not None
    storage = Storage(stack.settings.storage_root)
    weights = storage.read_bytes(f"{version.path}/model.safetensors")
    assert len(weights) == len(reference["weights"])
    assert weights != reference["weights"]


def test_a_worker_works_and_stops_without_a_broker(stack: Stack):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"redis://127.0.0.1:{server.getsockname()[1]}/0"
    worker = stack.start("lonely", redis_url=closed, queues="nobody-uses-this")

    def is_on_the_roll() -> bool:
        with transaction(stack.factory) as session:
            ids = session.scalars(select(Worker.id)).all()
        return any(f":{worker.pid}:" in worker_id for worker_id in ids)

    stack.wait(is_on_the_roll, "it signs in")
    worker.terminate()
    assert worker.wait(30) == 0
    assert not is_on_the_roll()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    with suppress(FileNotFoundError):
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    return False
