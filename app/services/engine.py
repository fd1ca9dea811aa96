"""The lease of a job: claimed, renewed, given back; and every way in which an attempt can end it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import case, func
from sqlalchemy.orm import Session

from app.db.models import Job, ModelVersion
from app.db.repositories.jobs import JobRepository, from_now
from app.db.repositories.queue import QueueRepository
from app.domain.states import JobKind, JobState, StopRequest
from app.errors import Fenced
from app.services.events import add_job_event, add_transition
from app.services.quotas import may_run


@dataclass(frozen=True, slots=True)
class Beat:
    """What a renewed lease brings back.

    Attributes:
        stop_requested: What a client asked for.
        order_version: Of the last order from outside; a higher one than known means there is something to send.
        branch: The job's; a higher one than the trainer's means that a rollback was ordered from outside.
    """

    stop_requested: StopRequest | None
    order_version: int
    branch: int


@dataclass(frozen=True, slots=True)
class CrashRules:
    """How often a job may crash without a new checkpoint, and how long it then waits.

    The first wait is a twelfth of the lease, each next one twice as long, at most five leases (at the default
    lease of 60 s: 5 s to 5 min).
    """

    max_crashes: int
    ttl: float

    def wait_seconds(self, crashes: int) -> float:
        """The wait after so many crashes in a row."""
        return float(min(self.ttl * 5, self.ttl / 12 * 2 ** max(crashes - 1, 0)))


def claim_job(
    session: Session,
    *,
    worker_id: str,
    free_slots: int,
    queues: Sequence[str],
    ttl: float,
    max_running: int | None = None,
) -> Job | None:
    """Leases the best queued job that fits the free slots to a worker, as the job's next attempt.

    Args:
        session: The caller's transaction.
        worker_id: Unique per process start.
        free_slots: GPUs (or CPU slots) the worker can give it; a job without GPUs takes one slot too.
        queues: Queues the worker serves.
        ttl: Seconds the lease lasts without a heartbeat.
        max_running: Jobs of one project that may run at once, where the project has no quota of its own.
    """
    if free_slots < 1:
        return None
    repository, passed_over = QueueRepository(session), list[UUID]()
    if not repository.has_fitting(free_slots, queues):
        return None
    while True:
        with session.begin_nested() as attempt:
            job = repository.claim(
                worker_id=worker_id,
                free_slots=free_slots,
                queues=queues,
                ttl=ttl,
                max_running=max_running,
                passed_over=passed_over,
            )
            if job is None or may_run(session, job.project_id, max_running):
                break
            # Another claimer took the project's last place at the same moment.
            passed_over.append(job.project_id)
            attempt.rollback()
    if job is not None:
        word = "Fine-tuning job started." if job.attempt == 1 else "Fine-tuning job taken up again."
        data = {"code": "claimed", "attempt": job.attempt}
        add_transition(session, job, JobState.RUNNING, word, data=data)
    return job


def adopt_job(session: Session, *, worker_id: str, known: Sequence[UUID], ttl: float) -> Job | None:
    """Takes up a job that is leased to this worker without its knowledge: the claim's reply was lost.

    Args:
        session: The caller's transaction.
        worker_id: Unique per process start.
        known: Jobs the worker is at work on.
        ttl: Of the renewed lease, in seconds.
    """
    job = JobRepository(session).find_leased_by(worker_id, known)
    if job is not None:
        job.lease_expires_at = from_now(ttl)
        session.flush()
        session.refresh(job)
    return job


def beat(
    session: Session,
    *,
    job_id: UUID,
    attempt: int,
    worker_id: str,
    ttl: float,
    at: tuple[int, int] | None = None,
) -> Beat:
    """Renews a lease.

    Args:
        session: The caller's transaction.
        job_id: The job.
        attempt: The one that beats.
        worker_id: Whose lease it is.
        ttl: Seconds from now on the database's clock.
        at: Branch and step of the trainer; a step of a branch that has been left is not written.

    Raises:
        Fenced: The lease is another's: stop at once.
    """
    values = {} if at is None else {"step": step_at(*at)}
    row = JobRepository(session).beat(job_id, attempt, worker_id, ttl=ttl, values=values)
    if row is None:
        raise Fenced(f"attempt {attempt} does not hold the job")
    return Beat(row.stop_requested, row.order_version, row.branch)


def step_at(branch: int, step: int) -> Any:  # noqa: ANN401 - an SQL expression
    """The job's step: the trainer's, unless its branch was left by a rollback."""
    return case((Job.branch == branch, step), else_=Job.step)


def hold(session: Session, job_id: UUID, attempt: int) -> Job:
    """Locks the job's row for a write of this attempt; the first statement of every such transaction.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    job = JobRepository(session).lock_leased(job_id, attempt)
    if job is None:
        raise Fenced(f"attempt {attempt} does not hold the job")
    return job


def find_end(session: Session, job_id: UUID, attempt: int) -> JobState | None:
    """Where the job came to rest after this attempt: for an end whose commit went through with the reply lost."""
    job = JobRepository(session).lock(job_id)
    if job is None or job.attempt != attempt or job.state.is_leased:
        return None
    return job.state


def release_job(session: Session, job_id: UUID, attempt: int, *, reason: str) -> JobState:
    """Gives a job back unharmed, as at a drain: queued again at once, its count of crashes untouched.

    One that was to stop anyway stops: cancelled, or paused.
    """
    job = hold(session, job_id, attempt)
    state = stopped_state(job)
    if state is not None:
        return _stop(session, job, state)
    end_lease(job, JobState.QUEUED)
    job.not_before = func.clock_timestamp()
    job.last_rung_at = None
    JobRepository(session).add_bell(job.id)
    session.flush()
    add_transition(session, job, job.state, reason, data={"code": "released"})
    return job.state


def mark_paused(session: Session, job_id: UUID, attempt: int) -> JobState:
    """The trainer has saved and left because it was told to pause."""
    job = hold(session, job_id, attempt)
    if job.state is JobState.RUNNING:
        job.move_to(JobState.PAUSING)
    return _stop(session, job, stopped_state(job) or JobState.PAUSED)


def pause_by_itself(
    session: Session, job_id: UUID, attempt: int, *, code: str, reason: str
) -> None:
    """Asks the job's own trainer to stop, as a client's pause does; nothing where it is to stop anyway."""
    job = hold(session, job_id, attempt)
    if job.state is not JobState.RUNNING or job.stop_requested is not None:
        return
    job.move_to(JobState.PAUSING)
    job.stop_requested = StopRequest.PAUSE
    session.flush()
    add_transition(session, job, job.state, reason, level="error", data={"code": code})


def mark_cancelled(session: Session, job_id: UUID, attempt: int) -> JobState:
    """The trainer has left because it was told to cancel."""
    return _stop(session, hold(session, job_id, attempt), JobState.CANCELLED)


def fail_job(
    session: Session, job_id: UUID, attempt: int, *, code: str, message: str, param: str | None
) -> JobState:
    """Ends a job for a reason that running it again cannot mend."""
    job = hold(session, job_id, attempt)
    end_failed(session, job, code=code, message=message, param=param)
    return job.state


def record_crash(
    session: Session, job_id: UUID, attempt: int, *, reason: str, rules: CrashRules
) -> JobState:
    """The trainer died: queued again after a wait, or failed once it has crashed too often."""
    return after_crash(session, hold(session, job_id, attempt), reason=reason, rules=rules)


def after_crash(session: Session, job: Job, *, reason: str, rules: CrashRules) -> JobState:
    """What becomes of a locked job whose attempt is over without a word."""
    state = stopped_state(job)
    if state is not None:
        return _stop(session, job, state)
    job.crashes_without_progress += 1
    if job.crashes_without_progress >= rules.max_crashes:
        end_failed(
            session,
            job,
            code="too_many_crashes",
            message=f"The job crashed {job.crashes_without_progress} times without a new checkpoint."
            f" Last: {reason}",
            param=None,
        )
        return job.state
    seconds = rules.wait_seconds(job.crashes_without_progress)
    end_lease(job, JobState.QUEUED)
    job.not_before = from_now(seconds)
    job.last_rung_at = None
    JobRepository(session).add_bell(job.id, seconds=seconds)
    session.flush()
    add_transition(
        session,
        job,
        job.state,
        f"{reason} The job goes on from its last checkpoint.",
        level="warn",
        data={"code": "crashed", "crashes_without_progress": job.crashes_without_progress},
    )
    return job.state


def stopped_state(job: Job) -> JobState | None:
    """What a job becomes that was asked to stop, once nobody works on it; None when nothing was asked."""
    if job.stop_requested is StopRequest.CANCEL:
        return JobState.CANCELLED
    return JobState.PAUSED if job.state is JobState.PAUSING else None


def end_lease(job: Job, state: JobState) -> None:
    """Moves a locked job out of its lease."""
    job.move_to(state)
    job.worker_id = None
    job.lease_expires_at = None
    if state.is_terminal:
        job.finished_at = func.clock_timestamp()
    if state is not JobState.QUEUED:
        job.stop_requested = None


def end_failed(session: Session, job: Job, *, code: str, message: str, param: str | None) -> None:
    """Moves a locked job to `failed` with its error."""
    end_lease(job, JobState.FAILED)
    _abandon_export(session, job)
    job.error = {"code": code, "message": message, "param": param}
    session.flush()
    add_transition(
        session, job, job.state, message, level="error", data={"code": code, "error": job.error}
    )


def note(
    session: Session,
    job_id: UUID,
    attempt: int,
    *,
    level: str,
    code: str,
    message: str,
    data: dict[str, Any],
) -> None:
    """Writes something the job's owner should read into its log."""
    add_job_event(
        session,
        hold(session, job_id, attempt),
        level="warn" if level == "warn" else "info",
        message=message,
        data={"code": code} | data,
    )


def _stop(session: Session, job: Job, state: JobState) -> JobState:
    end_lease(job, state)
    if state is JobState.CANCELLED:
        _abandon_export(session, job)
    session.flush()
    word = (
        "Fine-tuning job cancelled." if state is JobState.CANCELLED else "Fine-tuning job paused."
    )
    add_transition(session, job, state, word, data={"code": state.value, "step": job.step})
    return state


def _abandon_export(session: Session, job: Job) -> None:
    """The model version that an export job would have filled never comes."""
    if job.kind is JobKind.EXPORT and job.model_version_id is not None:
        version = session.get_one(ModelVersion, job.model_version_id)
        if version.status == "pending":
            version.status = "failed"
