"""External runs beside the queue: never claimed, never leased, never reaped."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app.db.models import Job
from app.db.repositories.jobs import JobRepository
from app.domain.external import CreateRun, FinishRun
from app.domain.states import JobState
from app.errors import Conflict, QuotaExceeded
from app.services.engine import claim_job
from app.services.external_runs import finish_run, register_run
from app.services.storage import Storage
from tests.external import registration, store_benchmark
from tests.factories import make_job, make_project


@pytest.fixture
def run(session, tmp_path) -> Job:
    project = make_project(session)
    store_benchmark(session, Storage(str(tmp_path / "storage")), project)
    return register_run(session, project.id, CreateRun.model_validate(registration()))


def test_no_worker_gets_it_and_no_sweep_takes_it(session, run) -> None:
    repository = JobRepository(session)
    assert claim_job(session, worker_id="w", free_slots=8, queues=["default"], ttl=60) is None
    assert repository.count_leases(60).leased == 0
    assert repository.lock_expired(ttl=0, overdue=-1e6) == []
    assert repository.ring_unanswered(limit=10, seconds=-1e6) == []
    assert repository.lock_validating() == []
    leased = make_job(session, state=JobState.RUNNING)
    assert repository.count_leases(60).leased == 1
    assert [job.id for job in repository.lock_expired(ttl=0, overdue=-1e6)] == [leased.id]
    assert run.state is JobState.RUNNING


@pytest.mark.parametrize(
    "change",
    [
        "state = 'queued'",
        "state = 'paused'",
        "worker_id = 'w', lease_expires_at = now()",
        "kind = 'fine_tuning'",
    ],
)
def test_the_database_refuses_to_lease_or_queue_it(session, run, change: str) -> None:
    with pytest.raises(IntegrityError), session.begin_nested():
        session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": run.id})


def test_only_an_external_run_lacks_a_base(session) -> None:
    with pytest.raises(IntegrityError, match="only_external_runs"), session.begin_nested():
        make_job(session, base_model_id=None)


def test_a_failure_keeps_its_message(session, run) -> None:
    body = FinishRun(status="failed", message="CUDA out of memory")
    done = finish_run(session, run.project_id, run.id, body)
    assert done.error is not None
    assert (done.state, done.error["message"]) == (JobState.FAILED, "CUDA out of memory")
    with pytest.raises(Conflict, match="failed already"):
        finish_run(session, run.project_id, run.id, FinishRun())


def test_runs_that_nobody_ends_are_bounded(session, run) -> None:
    body = CreateRun.model_validate(registration())
    with pytest.raises(QuotaExceeded):
        register_run(session, run.project_id, body, max_running=1)
    finish_run(session, run.project_id, run.id, FinishRun())
    made = register_run(session, run.project_id, body, max_running=1)
    assert made.state is JobState.RUNNING
