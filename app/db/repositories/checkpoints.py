"""Named queries over checkpoints."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, DecisionRow, Job, ModelVersion


class CheckpointRepository:
    """Saved training states; a directory counts only once a row names it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, checkpoint: Checkpoint) -> bool:
        """Inserts a row unless its point is registered already; whether it was new."""
        columns = Checkpoint.__table__.columns
        values = {
            column.name: getattr(checkpoint, column.name)
            for column in columns
            if getattr(checkpoint, column.name) is not None and column.name != "seq"
        }
        statement = insert(Checkpoint).values(**values)
        found = self._session.scalar(
            statement.on_conflict_do_nothing(
                index_elements=["job_id", "attempt", "branch", "step"]
            ).returning(Checkpoint.id)
        )
        return found is not None

    def find_at(self, job_id: UUID, attempt: int, branch: int, step: int) -> Checkpoint | None:
        """The checkpoint that an attempt saved at a point."""
        return self._session.scalar(
            select(Checkpoint).where(
                Checkpoint.job_id == job_id,
                Checkpoint.attempt == attempt,
                Checkpoint.branch == branch,
                Checkpoint.step == step,
            )
        )

    def find_path(self, job_id: UUID, path: str) -> Checkpoint | None:
        """The job's checkpoint that lies at a path under the storage root."""
        return self._session.scalar(
            select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.path == path)
        )

    def list_usable(self, job_id: UUID) -> Sequence[Checkpoint]:
        """What can be resumed from: newest branch, step and attempt first."""
        return self._session.scalars(
            select(Checkpoint)
            .where(*usable(job_id))
            .order_by(Checkpoint.branch.desc(), Checkpoint.step.desc(), Checkpoint.attempt.desc())
        ).all()

    def find_usable_at(self, job_id: UUID, step: int) -> Checkpoint | None:
        """What a job saved at a step and keeps, of its newest branch and attempt."""
        return self._session.scalar(
            select(Checkpoint)
            .where(*usable(job_id), Checkpoint.step == step)
            .order_by(Checkpoint.branch.desc(), Checkpoint.attempt.desc())
            .limit(1)
        )

    def list_kept(self, job_id: UUID) -> Sequence[Checkpoint]:
        """Every checkpoint whose files are still there."""
        return self._session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        ).all()

    def has_any(self, job_id: UUID) -> bool:
        """Whether the job ever saved anything."""
        return (
            self._session.scalar(select(Checkpoint.id).where(Checkpoint.job_id == job_id).limit(1))
            is not None
        )

    def list_pinned(self, job_id: UUID) -> set[UUID]:
        """Checkpoints that a rollback went to, a model version was made of, or an unended job starts from."""
        targets = select(DecisionRow.target_checkpoint_id).where(DecisionRow.job_id == job_id)
        published = select(ModelVersion.checkpoint_id).where(ModelVersion.job_id == job_id)
        starts = (
            select(Job.start_checkpoint_id)
            .join(Checkpoint, Checkpoint.id == Job.start_checkpoint_id)
            .where(Checkpoint.job_id == job_id, Job.finished_at.is_(None))
        )
        found = self._session.scalars(targets.union(published, starts))
        return {checkpoint_id for checkpoint_id in found if checkpoint_id is not None}

    def list_retried_jobs(self, *, days: float) -> Sequence[tuple[UUID, int]]:
        """Jobs with more than one attempt that have not ended, or not so long ago; with their attempt."""
        rows = self._session.execute(
            select(Job.id, Job.attempt).where(
                Job.attempt > 1,
                or_(
                    Job.finished_at.is_(None),
                    Job.finished_at > func.clock_timestamp() - timedelta(days=days),
                ),
            )
        )
        return [(row.id, row.attempt) for row in rows]

    def list_paths(self, job_ids: Sequence[UUID]) -> set[str]:
        """Where the checkpoints of these jobs lie."""
        return set(
            self._session.scalars(select(Checkpoint.path).where(Checkpoint.job_id.in_(job_ids)))
        )


def usable(job_id: UUID) -> tuple[ColumnElement[bool], ...]:
    """What a job's checkpoints have to be to be resumed from or published."""
    return (
        Checkpoint.job_id == job_id,
        Checkpoint.superseded.is_(False),
        Checkpoint.corrupt.is_(False),
        Checkpoint.deleted_at.is_(None),
    )
