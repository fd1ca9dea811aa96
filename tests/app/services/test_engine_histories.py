"""Random histories of claims, crashes, stops and stale writers against the real engine."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, Job, JobEvent, OutboxMessage, Project
from app.db.repositories.jobs import JobRepository
from app.domain.messages import CheckpointSaved
from app.domain.states import JobKind, JobState
from app.errors import Conflict, Fenced
from app.services import engine as jobs
from app.services.checkpoints import register_checkpoint
from app.services.control import request_cancel, request_pause, resume_job
from app.services.reaping import reap
from tests.factories import lease, make_base_model, make_job, make_project

TTL = 0.05  # shorter than the age of the tests' server, so that its guard holds nothing back
RULES = jobs.CrashRules(max_crashes=2, ttl=TTL)
WORKERS = ("a", "b", "c")

pick = st.integers(0, 1000)


class Histories(RuleBasedStateMachine):
    """Some jobs, three workers and clients that ask for anything at any time."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._connection = engine.connect()
        self._outer = self._connection.begin()
        self.session = Session(
            self._connection,
            expire_on_commit=False,
            join_transaction_mode="create_savepoint",
        )
        self.project: Project
        self.base: BaseModel
        self.attempts: list[tuple[UUID, int, str]] = []  # every claim there was
        self.holders: dict[UUID, tuple[int, str]] = {}  # who holds what now
        self.ended: dict[UUID, JobState] = {}
        self.steps: dict[UUID, int] = {}

    def teardown(self) -> None:
        self.session.close()
        self._outer.rollback()
        self._connection.close()

    @initialize()
    def begin(self) -> None:
        self.project = make_project(self.session)
        self.base = make_base_model(self.session)

    @rule(priority=st.integers(0, 2))
    def create(self, priority: int) -> None:
        make_job(
            self.session,
            self.project,
            kind=JobKind.EXPORT,
            base_model_id=self.base.id,
            priority=priority,
        )

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> None:
        self.session.execute(update(Job).values(not_before=func.clock_timestamp()))
        waiting = self.session.scalars(
            select(Job.id)
            .where(Job.state == JobState.QUEUED)
            .order_by(Job.priority.desc(), Job.seq)
        ).all()
        job = jobs.claim_job(
            self.session, worker_id=worker, free_slots=1, queues=("default",), ttl=60
        )
        assert (job.id if job else None) == (waiting[0] if waiting else None)
        if job is not None:
            before = [attempt for job_id, attempt, _ in self.attempts if job_id == job.id]
            assert job.attempt == max(before, default=0) + 1
            self.attempts.append((job.id, job.attempt, worker))
            self.holders[job.id] = (job.attempt, worker)

    @precondition(lambda self: self.attempts)
    @rule(number=pick)
    def beat(self, number: int) -> None:
        job_id, attempt, worker = self._attempt(number)
        self._as_holder(
            job_id,
            attempt,
            lambda: jobs.beat(
                self.session, job_id=job_id, attempt=attempt, worker_id=worker, ttl=60
            ),
        )

    @precondition(lambda self: self.attempts)
    @rule(number=pick)
    def save(self, number: int) -> None:
        job_id, attempt, _ = self._attempt(number)
        step = self.steps.get(job_id, 0) + 5
        message = CheckpointSaved(
            id=1,
            branch=0,
            step=step,
            directory="",
            manifest_sha256="0" * 64,
            size_bytes=1,
            metrics={},
            is_evaluated=False,
        )
        path = f"{job_id}/{attempt}/{step}"
        if self._as_holder(
            job_id,
            attempt,
            lambda: register_checkpoint(self.session, job_id, attempt, message, path),
        ):
            self.steps[job_id] = step
            assert self._job(job_id).crashes_without_progress == 0

    @precondition(lambda self: self.attempts)
    @rule(number=pick, how=st.sampled_from(["crash", "fail", "release", "pause", "cancel"]))
    def end(self, number: int, how: str) -> None:
        job_id, attempt, _ = self._attempt(number)
        ends: dict[str, Callable[[], Any]] = {
            "crash": lambda: jobs.record_crash(
                self.session, job_id, attempt, reason="crash.", rules=RULES
            ),
            "fail": lambda: jobs.fail_job(
                self.session, job_id, attempt, code="c", message="m", param=None
            ),
            "release": lambda: jobs.release_job(self.session, job_id, attempt, reason="drain"),
            "pause": lambda: jobs.mark_paused(self.session, job_id, attempt),
            "cancel": lambda: jobs.mark_cancelled(self.session, job_id, attempt),
        }
        if self._as_holder(job_id, attempt, ends[how]):
            del self.holders[job_id]

    @precondition(lambda self: self.holders)
    @rule(number=pick)
    def lose(self, number: int) -> None:
        """A worker falls silent, and its lease runs out."""
        job_id = sorted(self.holders)[number % len(self.holders)]
        statement = update(Job).where(Job.id == job_id)
        self.session.execute(statement.values(lease_expires_at=lease(-1)))
        found = reap(self.session, rules=RULES)
        assert [reaped.job_id for reaped in found.reaped] == [job_id]
        del self.holders[job_id]

    @rule(number=pick, wish=st.sampled_from([request_cancel, request_pause, resume_job]))
    def ask(self, number: int, wish: Callable[..., Job]) -> None:
        ids = self.session.scalars(select(Job.id).order_by(Job.seq)).all()
        if not ids:
            return
        job = self._job(ids[number % len(ids)])
        try:
            wish(self.session, project_id=self.project.id, job_id=job.id)
        except Conflict:
            return

    @invariant()
    def the_rows_agree_with_the_history(self) -> None:
        self.session.flush()
        self.session.expire_all()
        for job in self.session.scalars(select(Job)):
            held = self.holders.get(job.id)
            assert job.state.is_leased == (held is not None)
            if held is not None:
                assert (job.attempt, job.worker_id) == held
            if job.id in self.ended:
                assert job.state is self.ended[job.id]
            elif job.state.is_terminal:
                self.ended[job.id] = job.state
            self._check_log(job)

    @invariant()
    def only_the_attempt_of_its_time_wrote_a_checkpoint(self) -> None:
        claimed = {(job_id, attempt) for job_id, attempt, _ in self.attempts}
        for row in self.session.scalars(select(Checkpoint)):
            assert (row.job_id, row.attempt) in claimed

    def _check_log(self, job: Job) -> None:
        log = self.session.scalars(
            select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)
        ).all()
        assert [event.sequence for event in log] == list(range(1, job.event_count + 1))
        found = [(event.data or {}).get("status") for event in log]
        states = [JobState(status) for status in found if status is not None]
        assert sum(state.is_terminal for state in states) == int(job.state.is_terminal)
        if states:
            assert states[-1] is job.state
        if job.state is JobState.QUEUED and job.attempt > 0:
            bells = select(func.count()).where(OutboxMessage.job_id == job.id)
            assert (self.session.scalar(bells) or 0) > 0

    def _as_holder(self, job_id: UUID, attempt: int, write: Callable[[], Any]) -> bool:
        """Writes as an attempt; whether it may has to be what the history says."""
        may_write = self.holders.get(job_id, (0, ""))[0] == attempt
        events = self._job(job_id).event_count
        try:
            write()
        except Fenced:
            assert not may_write
            assert self._job(job_id).event_count == events
        else:
            assert may_write
        return may_write

    def _attempt(self, number: int) -> tuple[UUID, int, str]:
        return self.attempts[number % len(self.attempts)]

    def _job(self, job_id: UUID) -> Job:
        return self.session.get_one(Job, job_id, populate_existing=True)


def check(engine: Engine, *, max_examples: int) -> None:
    class Here(Histories):
        def __init__(self) -> None:
            super().__init__(engine)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_history_keeps_the_promises(engine: Engine):
    check(engine, max_examples=25)


def test_the_check_finds_an_engine_without_a_fence(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """A mutant that forgets the attempt: what the histories are for."""

    def lock_any(self: JobRepository, job_id: UUID, attempt: int) -> Job | None:
        return self.lock(job_id)

    monkeypatch.setattr(JobRepository, "lock_leased", lock_any)
    with pytest.raises((AssertionError, Conflict)):
        check(engine, max_examples=30)
