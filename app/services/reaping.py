"""What the reconciler mends: leases that ran out, bells nobody answered, jobs whose files are checked, leftovers."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.repositories.delivery import (
    OutboxRepository,
    WorkerRepository,
    delete_old_answers,
)
from app.db.repositories.jobs import JobRepository
from app.domain.states import JobState
from app.services.engine import CrashRules, after_crash
from app.services.submission import settle_validation

RING_AGAIN_SECONDS = 30.0
WORKER_SILENT_SECONDS = 60.0
OUTBOX_KEPT_SECONDS = 24 * 3600.0
#: So many leases may expire in one sweep, or this share of all, before it looks like a fault of the network.
FEW_LEASES = 3
SHARE_OF_LEASES = 0.3


class Reaped(NamedTuple):
    """A job whose lease had run out, and what became of it."""

    job_id: UUID
    attempt: int
    state: JobState


class Sweep(NamedTuple):
    """One sweep over the leases."""

    reaped: tuple[Reaped, ...]
    held_back: int  # expired leases left alone for one more TTL: too many at once


class Cleared(NamedTuple):
    """Rows that were removed."""

    outbox: int
    answers: int
    workers: int


def reap(session: Session, *, rules: CrashRules) -> Sweep:
    """Takes jobs away from workers that stopped renewing their lease.

    Nothing is taken for one TTL after the database was started, since no worker could renew meanwhile. When
    many leases have expired at once, the workers are more likely cut off than dead: those leases get another TTL.
    """
    repository = JobRepository(session)
    counts = repository.count_leases(rules.ttl)
    is_mass = counts.expired > max(FEW_LEASES, SHARE_OF_LEASES * counts.leased)
    jobs = repository.lock_expired(ttl=rules.ttl, overdue=rules.ttl if is_mass else 0)
    reaped = [
        Reaped(
            job.id,
            job.attempt,
            after_crash(session, job, reason="The worker's heartbeat stopped.", rules=rules),
        )
        for job in jobs
    ]
    return Sweep(tuple(reaped), max(counts.expired - len(reaped), 0) if is_mass else 0)


def ring_again(session: Session) -> int:
    """Queues doorbells anew for jobs that nobody came for, at most one for each idle slot; how many."""
    idle = WorkerRepository(session).count_idle_slots(seconds=WORKER_SILENT_SECONDS)
    if idle == 0:
        return 0
    repository = JobRepository(session)
    job_ids = repository.ring_unanswered(limit=idle, seconds=RING_AGAIN_SECONDS)
    for job_id in job_ids:
        repository.add_bell(job_id)
    session.flush()
    return len(job_ids)


def sweep_validating(session: Session) -> int:
    """Moves jobs on whose files have been checked: to the queue, or to `failed`; how many."""
    return sum(settle_validation(session, job) for job in JobRepository(session).lock_validating())


def clear_rows(session: Session) -> Cleared:
    """Removes rows that have served their time."""
    return Cleared(
        outbox=OutboxRepository(session).delete_done(seconds=OUTBOX_KEPT_SECONDS),
        answers=delete_old_answers(session),
        workers=WorkerRepository(session).delete_silent(seconds=10 * WORKER_SILENT_SECONDS),
    )
