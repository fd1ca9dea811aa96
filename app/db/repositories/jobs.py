"""Named queries over jobs: the queue, the leases, and what belongs to one job."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, DateTime, func, select, update
from sqlalchemy.orm import Session

from app.db.models import Job, JobOrder, OutboxMessage
from app.domain.states import LEASED, JobState, StopRequest

SWEEP_LIMIT = 100  # rows that one sweep of the reconciler takes


class BeatRow(NamedTuple):
    """What a heartbeat reads of its job."""

    state: JobState
    stop_requested: StopRequest | None
    order_version: int
    branch: int


class LeaseCounts(NamedTuple):
    """Leased jobs, and those of them whose lease has run out."""

    leased: int
    expired: int


class JobRepository:
    """Jobs as the engine sees them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_leased_by(self, worker_id: str, known: Sequence[UUID]) -> Job | None:
        """A job that a worker holds without knowing it, locked: its claim was committed, the reply lost."""
        return self._session.scalar(
            select(Job)
            .where(Job.worker_id == worker_id, Job.state == JobState.RUNNING, Job.id.not_in(known))
            .order_by(Job.seq)
            .limit(1)
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )

    def beat(
        self, job_id: UUID, attempt: int, worker_id: str, *, ttl: float, values: dict[str, Any]
    ) -> BeatRow | None:
        """Renews a lease and sets columns; None when it is no longer held."""
        row = self._session.execute(
            update(Job)
            .where(
                Job.id == job_id,
                Job.attempt == attempt,
                Job.worker_id == worker_id,
                Job.state.in_(LEASED),
            )
            .values(lease_expires_at=from_now(ttl), **values)
            .returning(Job.state, Job.stop_requested, Job.order_version, Job.branch)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        return None if row is None else BeatRow(*row)

    def lock(self, job_id: UUID) -> Job | None:
        """The job, its row locked against every other writer and read afresh."""
        return self._session.scalar(
            select(Job)
            .where(Job.id == job_id)
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )

    def lock_leased(self, job_id: UUID, attempt: int) -> Job | None:
        """The fence: the job, locked, if the attempt still holds it.

        Locking first is what makes it one; a condition inside an INSERT ... SELECT lets stale writers through.
        """
        return self._session.scalar(
            select(Job)
            .where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(LEASED))
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )

    def read_clock(self) -> float:
        """Seconds since 1970 on the database's clock."""
        now: datetime = self._session.scalars(
            select(func.clock_timestamp(type_=DateTime(timezone=True)))
        ).one()
        return now.timestamp()

    def count_leases(self, ttl: float) -> LeaseCounts:
        """Leases, and the expired ones among them; none counts as expired for one TTL after a server start."""
        expired = func.count().filter(_expired(ttl, 0))
        row = self._session.execute(
            select(func.count(), expired)
            .select_from(Job)
            .where(Job.state.in_(LEASED), Job.worker_id.is_not(None))  # external runs hold none
        ).one()
        return LeaseCounts(*row)

    def lock_expired(self, *, ttl: float, overdue: float) -> Sequence[Job]:
        """Jobs whose lease ran out more than `overdue` seconds ago, locked; rows that others hold are passed over."""
        return self._session.scalars(
            select(Job)
            .where(Job.state.in_(LEASED), _expired(ttl, overdue))
            .order_by(Job.lease_expires_at)
            .limit(SWEEP_LIMIT)
            .with_for_update(skip_locked=True, key_share=True)
            .execution_options(populate_existing=True)
        ).all()

    def ring_unanswered(self, *, limit: int, seconds: float) -> Sequence[UUID]:
        """Queued jobs whose bell nobody answered for so long; the time of ringing is set."""
        waiting = (
            select(Job.id)
            .where(
                Job.state == JobState.QUEUED,
                Job.not_before <= func.clock_timestamp(),
                func.coalesce(Job.last_rung_at, Job.created_at)
                < func.clock_timestamp() - timedelta(seconds=seconds),
            )
            .order_by(Job.priority.desc(), Job.seq)
            .limit(limit)
            .with_for_update(skip_locked=True, key_share=True)
            .cte("waiting")
            .prefix_with("MATERIALIZED", dialect="postgresql")
        )
        return self._session.scalars(
            update(Job)
            .where(Job.id == waiting.c.id)
            .values(last_rung_at=func.clock_timestamp())
            .returning(Job.id)
            .execution_options(synchronize_session=False)
        ).all()

    def lock_validating(self) -> Sequence[Job]:
        """Jobs that wait for their files, locked."""
        return self._session.scalars(
            select(Job)
            .where(Job.state == JobState.VALIDATING_FILES)
            .order_by(Job.seq)
            .limit(SWEEP_LIMIT)
            .with_for_update(skip_locked=True, key_share=True)
            .execution_options(populate_existing=True)
        ).all()

    def add_bell(self, job_id: UUID, *, seconds: float = 0) -> None:
        """A doorbell for the relay to ring, after so many seconds."""
        self._session.add(OutboxMessage(job_id=job_id, available_at=from_now(seconds)))

    def list_orders(self, job_id: UUID, branch: int, *, after: int) -> Sequence[JobOrder]:
        """Outside orders of a branch or a later one with a version above `after`, oldest first."""
        return self._session.scalars(
            select(JobOrder)
            .where(JobOrder.job_id == job_id, JobOrder.branch >= branch, JobOrder.version > after)
            .order_by(JobOrder.version)
        ).all()

    def find_order(self, job_id: UUID, version: int) -> JobOrder | None:
        """One outside order."""
        return self._session.scalar(
            select(JobOrder).where(JobOrder.job_id == job_id, JobOrder.version == version)
        )


def from_now(seconds: float) -> ColumnElement[Any]:
    """So many seconds from now, on the database's clock as it runs (not the transaction's start)."""
    return func.clock_timestamp(type_=DateTime(timezone=True)) + timedelta(seconds=seconds)


def _expired(ttl: float, overdue: float) -> ColumnElement[bool]:
    """Whether a lease has run out, with one TTL for everybody to renew after the database was started."""
    server_start = func.pg_postmaster_start_time(type_=DateTime(timezone=True))
    now = func.clock_timestamp(type_=DateTime(timezone=True))
    return (Job.lease_expires_at < now - timedelta(seconds=overdue)) & (
        now > server_start + timedelta(seconds=ttl)
    )
