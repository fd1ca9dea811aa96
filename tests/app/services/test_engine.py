"""Claims, leases, fences, endings and the reaper; races on a database of their own."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Job, JobEvent, OutboxMessage, Worker
from app.db.session import SessionFactory, transaction
from app.domain.messages import CheckpointSaved, Progress, StepMetrics
from app.domain.states import TRANSITIONS, JobKind, JobState, StopRequest
from app.errors import Conflict, Fenced, NotFound
from app.services import engine
from app.services.checkpoints import (
    NoValidCheckpoint,
    choose_resume,
    expire_checkpoints,
    mark_corrupt,
    register_checkpoint,
)
from app.services.control import request_cancel, request_pause, resume_job
from app.services.events import add_job_event
from app.services.progress import save_progress
from app.services.reaping import clear_rows, reap, ring_again
from tests.factories import (
    lease,
    make_base_model,
    make_checkpoint,
    make_job,
    make_project,
)

TTL = 60.0
RULES = engine.CrashRules(max_crashes=3, ttl=TTL)


def claim(
    session: Session,
    worker_id: str = "worker",
    free_slots: int = 1,
    queues: Sequence[str] = ("default",),
) -> Job | None:
    return engine.claim_job(
        session, worker_id=worker_id, free_slots=free_slots, queues=queues, ttl=TTL
    )


def events(session: Session, job: Job) -> list[JobEvent]:
    return list(
        session.scalars(
            select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)
        )
    )


def saved(step: int, branch: int = 0, **overrides) -> CheckpointSaved:
    fields = {
        "id": 1,
        "branch": branch,
        "step": step,
        "directory": "",
        "manifest_sha256": "0" * 64,
        "size_bytes": 10,
        "metrics": {},
        "is_evaluated": False,
    }
    return CheckpointSaved.model_validate(fields | overrides)


class TestClaim:
    def test_takes_the_highest_priority_then_the_oldest(self, session: Session):
        project = make_project(session)
        old = make_job(session, project)
        make_job(session, project)
        urgent = make_job(session, project, priority=5)
        taken = [claim(session), claim(session)]
        assert [job.id for job in taken if job is not None] == [urgent.id, old.id]

    def test_is_a_new_attempt_with_a_lease_and_an_event(self, session: Session):
        make_job(session, attempt=4)
        job = claim(session, "me")
        assert job is not None
        assert (job.state, job.attempt, job.worker_id) == (JobState.RUNNING, 5, "me")
        left = session.scalar(
            select(func.extract("epoch", Job.lease_expires_at - func.clock_timestamp()))
        )
        assert left is not None
        assert TTL - 5 < float(left) <= TTL
        assert events(session, job)[-1].data == {
            "status": "running",
            "code": "claimed",
            "attempt": 5,
        }

    def test_takes_only_what_fits_the_free_slots(self, session: Session):
        project = make_project(session)
        make_job(session, project, num_gpus=4, priority=9)
        small = make_job(session, project, num_gpus=2)
        assert claim(session, free_slots=1) is None
        job = claim(session, free_slots=2)
        assert job is not None
        assert job.id == small.id

    def test_a_job_without_gpus_needs_a_slot_too(self, session: Session):
        make_job(session, num_gpus=0)
        assert claim(session, free_slots=0) is None
        assert claim(session, free_slots=1) is not None

    def test_passes_over_other_queues_and_jobs_that_have_to_wait(self, session: Session):
        project = make_project(session)
        make_job(session, project, queue="other")
        make_job(session, project, not_before=lease(30))
        assert claim(session) is None
        assert claim(session, queues=("other", "default")) is not None

    @pytest.mark.parametrize("state", [s for s in JobState if s is not JobState.QUEUED])
    def test_takes_nothing_that_is_not_queued(self, session: Session, state: JobState):
        make_job(session, state=state)
        assert claim(session) is None

    def test_a_claim_whose_reply_was_lost_is_adopted_once(self, session: Session):
        known = make_job(session, state=JobState.RUNNING, worker_id="me")
        lost = make_job(session, state=JobState.RUNNING, worker_id="me", lease_expires_at=lease(1))
        make_job(session, state=JobState.RUNNING, worker_id="another")
        job = engine.adopt_job(session, worker_id="me", known=[known.id], ttl=TTL)
        assert job is not None
        assert (job.id, job.attempt) == (lost.id, 1)
        assert engine.adopt_job(session, worker_id="me", known=[known.id, lost.id], ttl=TTL) is None

    def test_many_claimers_take_each_job_once(self, committed_factory: SessionFactory):
        num_jobs, num_claimers = 80, 8
        with transaction(committed_factory) as session:
            project, base = make_project(session), make_base_model(session)
            for _ in range(num_jobs):
                make_job(
                    session,
                    project,
                    kind=JobKind.EXPORT,
                    base_model_id=base.id,
                )
        start = threading.Barrier(num_claimers)

        def take_all(worker_id: str) -> list[UUID]:
            start.wait()
            taken: list[UUID] = []
            while True:
                with transaction(committed_factory) as session:
                    job = claim(session, worker_id)
                if job is None:
                    return taken
                taken.append(job.id)

        with ThreadPoolExecutor(num_claimers) as pool:
            found = list(pool.map(take_all, [f"w{n}" for n in range(num_claimers)]))
        ids = [job_id for taken in found for job_id in taken]
        assert len(ids) == num_jobs
        assert len(set(ids)) == num_jobs
        with transaction(committed_factory) as session:
            assert session.scalars(select(Job.attempt).distinct()).all() == [1]


class TestFence:
    def test_a_heartbeat_renews_and_brings_back_what_was_asked(self, session: Session):
        job = make_job(
            session,
            state=JobState.RUNNING,
            stop_requested=StopRequest.CANCEL,
            order_version=3,
            lease_expires_at=lease(1),
        )
        answer = engine.beat(
            session, job_id=job.id, attempt=1, worker_id="worker", ttl=TTL, at=(0, 7)
        )
        session.refresh(job)
        assert answer == engine.Beat(StopRequest.CANCEL, 3, 0)
        assert job.step == 7
        assert job.lease_expires_at is not None
        assert session.scalar(select(Job.lease_expires_at > lease(TTL - 5)))

    def test_a_step_of_a_branch_that_was_left_is_not_written(self, session: Session):
        job = make_job(session, state=JobState.RUNNING, branch=1, step=20)
        engine.beat(session, job_id=job.id, attempt=1, worker_id="worker", ttl=TTL, at=(0, 35))
        session.refresh(job)
        assert job.step == 20

    @pytest.mark.parametrize(("attempt", "worker_id"), [(1, "worker"), (2, "another")])
    def test_another_attempt_or_worker_is_refused(
        self, session: Session, attempt: int, worker_id: str
    ):
        job = make_job(session, state=JobState.RUNNING, attempt=2)
        with pytest.raises(Fenced):
            engine.beat(session, job_id=job.id, attempt=attempt, worker_id=worker_id, ttl=TTL)

    @pytest.mark.parametrize(
        "write",
        [
            lambda s, j: engine.release_job(s, j, 1, reason=""),
            lambda s, j: engine.mark_paused(s, j, 1),
            lambda s, j: engine.mark_cancelled(s, j, 1),
            lambda s, j: engine.fail_job(s, j, 1, code="c", message="m", param=None),
            lambda s, j: engine.record_crash(s, j, 1, reason="", rules=RULES),
            lambda s, j: engine.note(s, j, 1, level="info", code="c", message="m", data={}),
            lambda s, j: register_checkpoint(s, j, 1, saved(10), "path"),
            lambda s, j: expire_checkpoints(s, j, 1),
            lambda s, j: mark_corrupt(s, j, 1, uuid4()),
        ],
    )
    def test_a_stale_attempt_writes_nothing(self, session: Session, write):
        job = make_job(session, state=JobState.RUNNING, attempt=2)
        with pytest.raises(Fenced):
            write(session, job.id)
        assert events(session, job) == []
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0
        assert session.scalar(select(func.count()).select_from(OutboxMessage)) == 0

    def test_a_checkpoint_racing_with_the_reaper_never_gets_in(
        self, committed_factory: SessionFactory
    ):
        """The reaper holds the row lock; the stale attempt waits for it, and then sees that it lost."""
        with transaction(committed_factory) as session:
            job = make_job(session, state=JobState.RUNNING, lease_expires_at=lease(-1))
        refused = []

        def register() -> None:
            try:
                with transaction(committed_factory) as session:
                    register_checkpoint(session, job.id, 1, saved(10), "path")
            except Fenced:
                refused.append(True)

        thread = threading.Thread(target=register)
        with transaction(committed_factory) as session:
            engine.after_crash(session, engine.hold(session, job.id, 1), reason="gone", rules=RULES)
            thread.start()
            deadline = time.monotonic() + 5
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            with committed_factory() as watcher:
                while not watcher.scalar(text(waiting)) and time.monotonic() < deadline:
                    time.sleep(0.01)
        thread.join()
        assert refused == [True]
        with transaction(committed_factory) as session:
            assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0

    def test_an_end_whose_reply_was_lost_is_found_again(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        assert engine.find_end(session, job.id, 1) is None
        engine.mark_cancelled(session, job.id, 1)
        assert engine.find_end(session, job.id, 1) is JobState.CANCELLED
        assert engine.find_end(session, job.id, 2) is None


class TestEnds:
    def test_a_drained_job_is_queued_again_without_blame(self, session: Session):
        job = make_job(session, state=JobState.RUNNING, crashes_without_progress=1)
        assert engine.release_job(session, job.id, 1, reason="drained") is JobState.QUEUED
        session.refresh(job)
        assert (job.crashes_without_progress, job.worker_id) == (1, None)
        assert claim(session) is not None
        assert session.scalars(select(OutboxMessage.job_id)).all() == [job.id]

    @pytest.mark.parametrize(
        ("state", "stop", "becomes"),
        [
            (JobState.RUNNING, StopRequest.CANCEL, JobState.CANCELLED),
            (JobState.PAUSING, StopRequest.PAUSE, JobState.PAUSED),
            (JobState.PAUSING, StopRequest.CANCEL, JobState.CANCELLED),
        ],
    )
    def test_a_drained_or_crashed_job_that_was_to_stop_stops(
        self, session: Session, state: JobState, stop: StopRequest, becomes: JobState
    ):
        for end in (
            lambda job: engine.release_job(session, job.id, 1, reason=""),
            lambda job: engine.record_crash(session, job.id, 1, reason="", rules=RULES),
        ):
            job = make_job(session, state=state, stop_requested=stop)
            assert end(job) is becomes
            session.refresh(job)
            assert job.stop_requested is None

    def test_crashes_wait_longer_and_longer_and_the_third_fails(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        waits = []
        for attempt in (1, 2):
            assert (
                engine.record_crash(session, job.id, attempt, reason="boom.", rules=RULES)
                is JobState.QUEUED
            )
            waits.append(
                float(
                    session.scalar(
                        select(func.extract("epoch", Job.not_before - func.clock_timestamp()))
                    )
                    or 0
                )
            )
            assert claim(session) is None
            session.execute(update(Job).values(not_before=func.clock_timestamp()))
            assert claim(session) is not None
        assert waits == [pytest.approx(5, abs=1), pytest.approx(10, abs=1)]
        state = engine.record_crash(session, job.id, 3, reason="boom.", rules=RULES)
        session.refresh(job)
        assert state is JobState.FAILED
        assert job.error is not None
        assert job.error["code"] == "too_many_crashes"

    def test_a_new_checkpoint_forgives_crashes_and_the_start_does_not(self, session: Session):
        job = make_job(session, state=JobState.RUNNING, crashes_without_progress=2)
        register_checkpoint(session, job.id, 1, saved(0), "start")
        session.refresh(job)
        assert job.crashes_without_progress == 2
        register_checkpoint(session, job.id, 1, saved(10), "ten")
        session.refresh(job)
        assert (job.crashes_without_progress, job.step) == (0, 10)

    def test_a_failure_keeps_code_message_and_param(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        engine.fail_job(session, job.id, 1, code="bad_rows", message="Line 3.", param="file")
        session.refresh(job)
        assert job.error == {"code": "bad_rows", "message": "Line 3.", "param": "file"}
        assert job.finished_at is not None


class TestControl:
    def test_a_waiting_job_is_cancelled_at_once(self, session: Session):
        for state in (JobState.QUEUED, JobState.VALIDATING_FILES, JobState.PAUSED):
            job = make_job(session, state=state)
            request_cancel(session, project_id=job.project_id, job_id=job.id)
            session.refresh(job)
            assert job.state is JobState.CANCELLED

    def test_a_running_job_is_cancelled_by_its_worker(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        for _ in range(2):  # asked twice, told once
            request_cancel(session, project_id=job.project_id, job_id=job.id)
        assert (job.state, job.stop_requested) == (JobState.RUNNING, StopRequest.CANCEL)
        assert [event.data for event in events(session, job)] == [{"code": "cancel_requested"}]

    def test_pause_then_resume_goes_round(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        request_pause(session, project_id=job.project_id, job_id=job.id)
        assert (job.state, job.stop_requested) == (JobState.PAUSING, StopRequest.PAUSE)
        with pytest.raises(Conflict):
            resume_job(session, project_id=job.project_id, job_id=job.id)
        engine.mark_paused(session, job.id, 1)
        resume_job(session, project_id=job.project_id, job_id=job.id)
        again = claim(session)
        assert again is not None
        assert (again.id, again.attempt) == (job.id, 2)

    @pytest.mark.parametrize("state", [s for s in JobState if s is not JobState.PAUSED])
    def test_only_a_paused_job_is_resumed(self, session: Session, state: JobState):
        job = make_job(session, state=state)
        with pytest.raises(Conflict, match="cannot be resumed"):
            resume_job(session, project_id=job.project_id, job_id=job.id)

    def test_what_cannot_be_is_refused(self, session: Session):
        queued, over = make_job(session), make_job(session, state=JobState.SUCCEEDED)
        with pytest.raises(Conflict):
            request_pause(session, project_id=queued.project_id, job_id=queued.id)
        with pytest.raises(Conflict, match="succeeded already"):
            request_cancel(session, project_id=over.project_id, job_id=over.id)
        with pytest.raises(NotFound):
            request_cancel(session, project_id=uuid4(), job_id=queued.id)

    def test_cancel_and_finish_racing_give_one_end(self, committed_factory: SessionFactory):
        for _ in range(15):
            with transaction(committed_factory) as session:
                job = make_job(session, state=JobState.RUNNING)
            start = threading.Barrier(2)

            def cancel(job: Job = job, start: threading.Barrier = start) -> str:
                start.wait()
                try:
                    with transaction(committed_factory) as session:
                        request_cancel(session, project_id=job.project_id, job_id=job.id)
                except Conflict:
                    return "refused"
                return "taken"

            def fail(job: Job = job, start: threading.Barrier = start) -> None:
                start.wait()
                with transaction(committed_factory) as session:
                    engine.fail_job(session, job.id, 1, code="c", message="m", param=None)

            with ThreadPoolExecutor(2) as pool:
                told, ended = pool.submit(cancel), pool.submit(fail)
                ended.result()
                assert told.result() in {"refused", "taken"}
            with transaction(committed_factory) as session:
                log = events(session, job)
                ends = [e for e in log if (e.data or {}).get("status") in {"failed", "cancelled"}]
                assert [e.data["status"] for e in ends if e.data] == ["failed"]
                assert log[-1] is ends[-1]


class TestTransitions:
    @pytest.mark.parametrize("before", list(JobState))
    @pytest.mark.parametrize("after", list(JobState))
    def test_move_to_follows_the_table(self, before: JobState, after: JobState):
        job = Job(state=before)
        if after in TRANSITIONS[before]:
            job.move_to(after)
            assert job.state is after
        else:
            with pytest.raises(Conflict):
                job.move_to(after)

    @pytest.mark.parametrize("before", [s for s in JobState if s.is_terminal])
    @pytest.mark.parametrize("after", list(JobState))
    def test_the_database_keeps_terminal_states(
        self, session: Session, before: JobState, after: JobState
    ):
        job = make_job(session, state=before)
        values: dict[str, Any] = {"state": after, "finished_at": func.clock_timestamp()}
        if after.is_leased:
            values |= {"worker_id": "w", "lease_expires_at": lease(5), "finished_at": None}
        elif not after.is_terminal:
            values |= {"finished_at": None}
        statement = update(Job).where(Job.id == job.id).values(values)
        if after is before:
            session.execute(statement)
        else:
            with pytest.raises(IntegrityError, match="for good"):
                session.execute(statement)

    def test_a_lease_goes_with_the_leased_states_alone(self, session: Session):
        with pytest.raises(IntegrityError, match="lease_goes_with_state"):
            make_job(session, state=JobState.QUEUED, worker_id="w", lease_expires_at=lease(5))


class TestReap:
    def expired(self, session: Session, **overrides) -> Job:
        fields = {"state": JobState.RUNNING, "lease_expires_at": lease(-1)} | overrides
        return make_job(session, **fields)

    def ready(self, session: Session, seconds: float = 0.3) -> None:
        """Waits until the tests' server is old enough for the guard."""
        age = session.scalar(
            select(func.extract("epoch", func.clock_timestamp() - func.pg_postmaster_start_time()))
        )
        time.sleep(max(seconds - float(age or 0), 0))

    rules = engine.CrashRules(max_crashes=3, ttl=0.2)

    def test_takes_expired_leases_and_no_others(self, session: Session):
        self.ready(session)
        dead = self.expired(session)
        make_job(session, state=JobState.RUNNING)
        sweep = reap(session, rules=self.rules)
        assert [(r.job_id, r.attempt, r.state) for r in sweep.reaped] == [
            (dead.id, 1, JobState.QUEUED)
        ]

    def test_what_was_to_stop_stops(self, session: Session):
        self.ready(session)
        jobs = [
            self.expired(session, state=JobState.PAUSING, stop_requested=StopRequest.PAUSE),
            self.expired(session, stop_requested=StopRequest.CANCEL),
            self.expired(session, crashes_without_progress=2),
        ]
        found = {r.job_id: r.state for r in reap(session, rules=self.rules).reaped}
        assert [found[job.id] for job in jobs] == [
            JobState.PAUSED,
            JobState.CANCELLED,
            JobState.FAILED,
        ]

    def test_nothing_is_taken_for_one_lease_after_a_server_start(self, session: Session):
        self.expired(session)
        assert reap(session, rules=engine.CrashRules(3, ttl=1e6)).reaped == ()

    def test_many_at_once_get_one_more_lease(self, session: Session):
        self.ready(session, 5.5)
        rules = engine.CrashRules(3, ttl=5)
        jobs = [self.expired(session) for _ in range(4)]
        sweep = reap(session, rules=rules)
        assert (sweep.reaped, sweep.held_back) == ((), 4)
        session.execute(update(Job).values(lease_expires_at=lease(-6)))
        assert len(reap(session, rules=rules).reaped) == len(jobs)

    def test_a_row_that_another_holds_is_passed_over(self, committed_factory: SessionFactory):
        with transaction(committed_factory) as session:
            self.ready(session)
            held, free = self.expired(session), self.expired(session)
        with transaction(committed_factory) as holder:
            holder.execute(select(Job).where(Job.id == held.id).with_for_update())
            with transaction(committed_factory) as session:
                reaped = reap(session, rules=self.rules).reaped
        assert [r.job_id for r in reaped] == [free.id]

    def test_unanswered_bells_are_rung_again_for_idle_slots_alone(self, session: Session):
        project = make_project(session)
        old = {"created_at": lease(-300)}
        jobs = [make_job(session, project, **old) for _ in range(3)]
        make_job(session, project, last_rung_at=lease(-5), **old)
        assert ring_again(session) == 0  # nobody is there
        session.add(Worker(id="w", host="h", num_slots=4, num_free=2, device="cpu"))
        session.add(
            Worker(id="gone", host="h", num_slots=4, num_free=4, device="cpu", seen_at=lease(-999))
        )
        session.flush()
        assert ring_again(session) == 2
        rung = session.scalars(select(OutboxMessage.job_id)).all()
        assert sorted(rung) == sorted(job.id for job in jobs[:2])
        assert ring_again(session) == 1
        assert clear_rows(session).workers == 1


class TestEvents:
    def test_sequences_have_no_gap_however_many_write(self, committed_factory: SessionFactory):
        with transaction(committed_factory) as session:
            job = make_job(session)

        def write(number: int) -> None:
            for _ in range(10):
                with transaction(committed_factory) as session:
                    row = session.get_one(Job, job.id)
                    add_job_event(session, row, level="info", message=f"from {number}")

        def give_up(_: int) -> None:
            with committed_factory() as session:
                row = session.get_one(Job, job.id)
                add_job_event(session, row, level="info", message="rolled back")
                session.rollback()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(write, range(4)))
            list(pool.map(give_up, range(4)))
            list(pool.map(write, range(4)))
        with transaction(committed_factory) as session:
            assert [event.sequence for event in events(session, job)] == list(range(1, 81))
            assert session.get_one(Job, job.id).event_count == 80

    def test_progress_keeps_a_sample_of_metrics_and_renews_the_lease(self, session: Session):
        job = make_job(session, state=JobState.RUNNING, lease_expires_at=lease(1))
        steps = tuple(
            StepMetrics(
                step=step,
                branch=0,
                train_loss=1.0 / step,
                train_mean_token_accuracy=0.5,
                learning_rate=1e-3,
                tokens=10,
                seconds=0.1,
            )
            for step in range(1, 1001)
        )
        message = Progress(
            id=1,
            branch=0,
            step=1000,
            total_steps=1000,
            seconds_remaining=40.0,
            trained_tokens=10_000,
            phase="training",
            metrics=steps,
        )
        began = time.time()
        answer = save_progress(session, job.id, 1, message, worker_id="worker", ttl=TTL)
        log = events(session, job)
        assert answer.stop_requested is None
        assert [event.data["step"] for event in log if event.data] == list(range(5, 1001, 5))
        assert {event.type for event in log} == {"metrics"}
        session.refresh(job)
        assert job.step == 1000
        assert job.progress is not None
        assert job.progress["phase"] == "training"
        assert began + 39 < job.progress["finish_at"] < time.time() + 41
        assert session.scalar(select(Job.lease_expires_at > lease(TTL - 5)))


class TestCheckpoints:
    def test_registering_again_changes_nothing(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        first = register_checkpoint(session, job.id, 1, saved(10), "path")
        register_checkpoint(session, job.id, 1, saved(20), "later")
        again = register_checkpoint(session, job.id, 1, saved(10), "path")
        session.refresh(job)
        assert again.id == first.id
        assert job.step == 20
        assert job.ckpt_id != first.id

    def test_one_of_a_branch_that_was_left_is_superseded(self, session: Session):
        job = make_job(session, state=JobState.RUNNING, branch=1)
        found = register_checkpoint(session, job.id, 1, saved(10), "path")
        session.refresh(job)
        assert found.superseded
        assert job.ckpt_id is None
        with pytest.raises(Fenced):
            register_checkpoint(session, job.id, 1, saved(10, branch=2), "path")

    def test_a_damaged_one_gives_way_to_the_one_before(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        for step in (0, 10, 20):
            register_checkpoint(session, job.id, 1, saved(step), f"step-{step}")
        session.refresh(job)
        chosen = choose_resume(session, job)
        for expected in (20, 10, 0):
            assert chosen is not None
            assert chosen.step == expected
            mark_corrupt(session, job.id, 1, chosen.id)
            if expected > 0:
                chosen = choose_resume(session, job)
        with pytest.raises(NoValidCheckpoint):
            choose_resume(session, job)

    def test_a_job_that_saved_nothing_starts_over(self, session: Session):
        assert choose_resume(session, make_job(session, state=JobState.RUNNING)) is None

    def test_thinning_keeps_last_best_good_and_start(self, session: Session):
        job = make_job(session, state=JobState.RUNNING)
        make_checkpoint(session, job, step=0)
        losses = {10: 0.9, 20: 0.2, 30: 0.5, 40: 0.6, 50: 0.7, 60: 0.8, 70: 0.9}
        for step, loss in losses.items():
            status = "good" if step in {10, 20, 30} else "unproven"
            make_checkpoint(
                session, job, step=step, status=status, valid_loss=loss, is_evaluated=True
            )
        make_checkpoint(session, job, step=65, superseded=True)
        dropped = expire_checkpoints(session, job.id, 1)
        kept = session.scalars(
            select(Checkpoint.step).where(Checkpoint.deleted_at.is_(None)).order_by("step")
        ).all()
        # start; best good 20; last good 30; best unproven 40; last three
        assert kept == [0, 20, 30, 40, 50, 60, 70]
        assert len(dropped) == 2
        assert expire_checkpoints(session, job.id, 1) == []
