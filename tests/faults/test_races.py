"""Rows F27 and F28: a cancel meets an end, and a rollback is recorded twice or broken off."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from app.db.models import Checkpoint, DecisionRow, Job, JobEvent
from app.db.session import SessionFactory, transaction
from app.domain.policy import EarlyStopping, Ladder, Policy
from app.domain.states import JobState
from app.errors import Conflict
from app.services import engine
from app.services.control import request_cancel
from tests.factories import make_base_model, make_job, make_project
from tests.faults.fleet import Fleet, measured
from tests.faults.processes import eventually, find_trainers
from tests.faults.proxy import Proxy

ROUNDS = 500
POLICY = Policy(
    benchmarks=(), eval_interval=12, ladder=Ladder(repair=False), early_stopping=EarlyStopping()
)


@pytest.mark.slow
def test_f27_cancel_and_end_at_once_give_one_end_and_tell_both_the_truth(
    committed_factory: SessionFactory,
):
    with transaction(committed_factory) as session:
        project, base = make_project(session), make_base_model(session)
        fields = {"state": JobState.RUNNING, "base_model_id": base.id}
        jobs = [make_job(session, project, **fields) for _ in range(ROUNDS)]
    start = threading.Barrier(2)

    def cancel(job: Job) -> str:
        start.wait()
        try:
            with transaction(committed_factory) as session:
                request_cancel(session, project_id=job.project_id, job_id=job.id)
        except Conflict:
            return "refused"
        return "taken"

    def end(job: Job) -> JobState:
        """A worker that hears of the cancel obeys it; one that does not ends the job."""
        start.wait()
        with transaction(committed_factory) as session:
            held = engine.hold(session, job.id, 1)
            if held.stop_requested is not None:
                return engine.mark_cancelled(session, job.id, 1)
            return engine.fail_job(session, job.id, 1, code="c", message="m", param=None)

    found: Counter[tuple[str, JobState]] = Counter()
    with ThreadPoolExecutor(2) as pool:
        for job in jobs:
            told, ended = pool.submit(cancel, job), pool.submit(end, job)
            found[told.result(), ended.result()] += 1
    assert set(found) <= {("refused", JobState.FAILED), ("taken", JobState.CANCELLED)}
    with transaction(committed_factory) as session:
        for job in jobs:
            events = session.scalars(
                select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)
            ).all()
            ends = [e for e in events if (e.data or {}).get("status") in {"failed", "cancelled"}]
            assert len(ends) == 1
            assert events[-1] is ends[0]
    measured("F27", rounds=ROUNDS, cancelled=found["taken", JobState.CANCELLED], two_ends=0)


def rolled_back(fleet: Fleet, job_id: Any) -> list[Any]:
    return [d for d in fleet.rows(DecisionRow, job_id) if d.action == "roll_back"]


def check_one_rollback(fleet: Fleet, job_id: Any) -> None:
    """One decision, one new branch, and nothing that was left is used."""
    job = fleet.job(job_id)
    assert len(rolled_back(fleet, job_id)) == 1
    assert job.branch == 1
    left = [c for c in fleet.rows(Checkpoint, job_id) if c.branch == 0 and c.step > 0]
    assert left
    target = job.run_plan["resume"]["step"] if job.run_plan and job.run_plan["resume"] else None
    assert target is None or all(c.superseded for c in left if c.step > target)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_f28_worker_killed_at_the_commit_of_a_rollback_rolls_back_once(fleet: Fleet, moment: Any):
    job_id = fleet.submit(steps=30, policy=POLICY)
    with Proxy(fleet.settings.database_url or "") as proxy:
        worker = fleet.worker("rolls_back", database_url=proxy.url)
        fleet.reaches(job_id, 7)
        killed = threading.Event()

        def kill() -> None:
            worker.kill()
            killed.set()

        proxy.at_commit(b"INSERT INTO decisions", moment, kill)
        eventually(killed.is_set, "the rollback's commit", tail=fleet.tail)
    assert len(rolled_back(fleet, job_id)) == (moment == "after")
    fleet.control()
    fleet.worker("rolls_back", scratch="elsewhere")
    job = fleet.ends(job_id)
    check_one_rollback(fleet, job_id)
    assert job.run_plan is not None
    assert job.run_plan["resume"]["branch"] == (moment == "after")
    fleet.check_history(job_id, attempts=2)
    measured("F28", killed=f"{moment} the rollback's commit", rollbacks=1)


@pytest.mark.slow
def test_f28_lost_reply_to_a_rollback_is_asked_for_again_and_acts_once(fleet: Fleet):
    job_id = fleet.submit(steps=30, policy=POLICY)
    with Proxy(fleet.settings.database_url or "") as proxy:
        lost = threading.Event()
        proxy.at_commit(b"INSERT INTO decisions", "after", lost.set)
        fleet.worker("rolls_back", database_url=proxy.url)
        fleet.ends(job_id)
    assert lost.is_set()
    check_one_rollback(fleet, job_id)
    fleet.check_history(job_id, attempts=1)
    assert not find_trainers(job_id.hex)
    measured("F28", lost_reply="rollback", rollbacks=1)
