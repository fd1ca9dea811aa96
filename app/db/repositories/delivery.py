"""Named queries over the outbox, the roll of workers and remembered answers."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import IdempotencyKey, Job, OutboxMessage, Worker
from app.db.repositories.jobs import from_now
from app.domain.states import JobState


class OutboxRepository:
    """Doorbells to ring once their transaction has committed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def claim_due(self, *, limit: int, seconds: float) -> Sequence[tuple[int, UUID]]:
        """Due messages as (id, job), hidden from other relays for so many seconds.

        Found by `done_at` and not by an id above the last: rows commit out of order.
        """
        due = (
            select(OutboxMessage.id)
            .where(
                OutboxMessage.done_at.is_(None),
                OutboxMessage.available_at <= func.clock_timestamp(),
            )
            .order_by(OutboxMessage.available_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("due")
            .prefix_with("MATERIALIZED", dialect="postgresql")
        )
        rows = self._session.execute(
            update(OutboxMessage)
            .where(OutboxMessage.id == due.c.id)
            .values(available_at=from_now(seconds), tries=OutboxMessage.tries + 1)
            .returning(OutboxMessage.id, OutboxMessage.job_id)
            .execution_options(synchronize_session=False)
        )
        return [(row.id, row.job_id) for row in rows]

    def list_waiting_jobs(self, job_ids: Sequence[UUID]) -> set[UUID]:
        """Those of the jobs that still wait for a worker."""
        found = self._session.scalars(
            select(Job.id).where(Job.id.in_(job_ids), Job.state == JobState.QUEUED)
        )
        return set(found)

    def mark_done(self, ids: Sequence[int], rung: Sequence[UUID]) -> None:
        """Messages that are done with, and jobs whose bell was rung for them."""
        self._session.execute(
            update(OutboxMessage)
            .where(OutboxMessage.id.in_(ids))
            .values(done_at=func.clock_timestamp())
            .execution_options(synchronize_session=False)
        )
        self._session.execute(
            update(Job)
            .where(Job.id.in_(rung), Job.state == JobState.QUEUED)
            .values(last_rung_at=func.clock_timestamp())
            .execution_options(synchronize_session=False)
        )

    def put_off(self, ids: Sequence[int], *, base: float, most: float) -> None:
        """Messages that could not be delivered, to be tried again after a wait that doubles."""
        wait = func.least(most, base * func.power(2, func.least(OutboxMessage.tries, 16) - 1))
        self._session.execute(
            update(OutboxMessage)
            .where(OutboxMessage.id.in_(ids))
            .values(
                available_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, wait)
            )
            .execution_options(synchronize_session=False)
        )

    def delete_done(self, *, seconds: float) -> int:
        """Removes messages done so long ago; how many there were."""
        found = self._session.execute(
            delete(OutboxMessage)
            .where(OutboxMessage.done_at < from_now(-seconds))
            .returning(OutboxMessage.id)
            .execution_options(synchronize_session=False)
        )
        return len(found.all())


class WorkerRepository:
    """The roll of live worker processes."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def sign_in(
        self, worker_id: str, *, host: str, num_slots: int, num_free: int, device: str
    ) -> None:
        """Says that a worker lives and how many of its slots are free."""
        values = {"host": host, "num_slots": num_slots, "num_free": num_free, "device": device}
        statement = insert(Worker).values(id=worker_id, **values)
        self._session.execute(
            statement.on_conflict_do_update(
                index_elements=[Worker.id], set_=values | {"seen_at": func.clock_timestamp()}
            )
        )

    def sign_out(self, worker_id: str) -> None:
        """Takes a worker off the roll."""
        self._session.execute(delete(Worker).where(Worker.id == worker_id))

    def count_idle_slots(self, *, seconds: float) -> int:
        """Free slots of the workers seen within so many seconds."""
        found = self._session.scalar(
            select(func.sum(Worker.num_free)).where(Worker.seen_at > from_now(-seconds))
        )
        return int(found or 0)

    def delete_silent(self, *, seconds: float) -> int:
        """Takes workers off the roll that were not seen for so long; how many."""
        found = self._session.execute(
            delete(Worker).where(Worker.seen_at < from_now(-seconds)).returning(Worker.id)
        )
        return len(found.all())


def delete_old_answers(session: Session, *, hours: float = 24) -> int:
    """Removes remembered answers to Idempotency-Keys that are older; how many there were."""
    found = session.execute(
        delete(IdempotencyKey)
        .where(IdempotencyKey.created_at < func.clock_timestamp() - timedelta(hours=hours))
        .returning(IdempotencyKey.key)
    )
    return len(found.all())
