"""Queries of those who follow jobs: their logs forwards, and how far many logs have come."""

from collections.abc import Collection, Sequence
from uuid import UUID

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from app.db.models import ApiKey, Job, JobEvent
from app.domain.states import JobState

#: What an event shows of itself.
COLUMNS = (
    JobEvent.id,
    JobEvent.created_at,
    JobEvent.level,
    JobEvent.message,
    JobEvent.type,
    JobEvent.data,
    JobEvent.sequence,
)


class FollowingRepository:
    """Read by rows, not objects: a thousand followers read at once."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find_place(self, job_id: UUID, event_id: UUID) -> int | None:
        """The number of a line of a job's log."""
        return self._session.scalar(
            select(JobEvent.sequence).where(JobEvent.id == event_id, JobEvent.job_id == job_id)
        )

    def get_state(self, job_id: UUID) -> tuple[JobState, int]:
        """A job's state, and the number of its last line."""
        row = self._session.execute(select(Job.state, Job.event_count).where(Job.id == job_id))
        state, count = row.one()
        return state, count

    def list_lines(
        self, job_id: UUID, *, after: int, limit: int
    ) -> Sequence[Row[*tuple[object, ...]]]:
        """Lines of a log after a number, oldest first."""
        return self._session.execute(
            select(*COLUMNS)
            .where(JobEvent.job_id == job_id, JobEvent.sequence > after)
            .order_by(JobEvent.sequence)
            .limit(limit)
        ).all()

    def count_lines(self, job_ids: Collection[UUID]) -> dict[UUID, int]:
        """The number of each job's last line."""
        found = self._session.execute(
            select(Job.id, Job.event_count).where(Job.id == func.any(list(job_ids)))
        )
        return {row.id: row.event_count for row in found}

    def list_live_keys(self, key_ids: Collection[str]) -> set[str]:
        """Those of some keys that are neither revoked nor expired."""
        return set(
            self._session.scalars(
                select(ApiKey.key_id).where(
                    ApiKey.key_id == func.any(list(key_ids)),
                    ApiKey.revoked_at.is_(None),
                    (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.clock_timestamp()),
                )
            )
        )
