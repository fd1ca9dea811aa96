"""Queries on jobs as clients see them: their rows, events, checkpoints and decisions."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app.db.models import (
    BaseModel,
    Checkpoint,
    DecisionRow,
    Job,
    JobEvent,
    ModelVersion,
    OutboxMessage,
    Project,
)
from app.db.repositories.paging import newest_first
from app.domain.states import JobKind
from app.errors import NotFound


class ProjectJobRepository:
    """Jobs of a project."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, job: Job) -> None:
        """Keeps a new job."""
        self._session.add(job)
        self._session.flush()
        self._session.refresh(job)

    def get(
        self,
        project_id: UUID,
        job_id: UUID,
        *,
        kind: JobKind = JobKind.FINE_TUNING,
        for_update: bool = False,
    ) -> Job:
        """The job with this id; `for_update` locks its row and reads it afresh.

        Raises:
            NotFound: The project has no such job of this kind.
        """
        query = select(Job).where(Job.id == job_id, Job.project_id == project_id, Job.kind == kind)
        if for_update:
            query = query.with_for_update().execution_options(populate_existing=True)
        job = self._session.scalar(query)
        if job is None:
            raise NotFound("No fine-tuning job has this id.", "fine_tuning_job_id")
        return job

    def list_page(
        self,
        project_id: UUID,
        *,
        after: Job | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> list[Job]:
        """Fine-tuning jobs, newest first; `metadata` keeps those that hold all its pairs."""
        query = select(Job).where(Job.project_id == project_id, Job.kind == JobKind.FINE_TUNING)
        if metadata:
            query = query.where(Job.metadata_.contains(dict(metadata)))
        if without_metadata:
            query = query.where(func.coalesce(Job.metadata_, func.jsonb("{}")) == {})
        query = newest_first(query, Job, after=after, limit=limit)
        return list(self._session.scalars(query))

    def ring_later(self, job: Job) -> None:
        """Writes the doorbell that the outbox relay rings once this transaction has committed."""
        self._session.add(OutboxMessage(job_id=job.id))
        self._session.flush()

    def get_project(self, project_id: UUID) -> Project:
        """A project by its id, which a key vouches for."""
        return self._session.get_one(Project, project_id)

    def base_models(self, jobs: Sequence[Job]) -> dict[UUID, BaseModel]:
        """The base models of jobs, by id."""
        ids = {job.base_model_id for job in jobs}
        found = self._session.scalars(select(BaseModel).where(BaseModel.id.in_(ids)))
        return {base.id: base for base in found}

    def model_versions(self, jobs: Sequence[Job]) -> dict[UUID, ModelVersion]:
        """The published versions of jobs, by id."""
        ids = {job.model_version_id for job in jobs if job.model_version_id is not None}
        found = self._session.scalars(select(ModelVersion).where(ModelVersion.id.in_(ids)))
        return {version.id: version for version in found}


class JobHistoryRepository:
    """What happened to one job, page by page, newest first."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_events(self, job: Job, *, after: UUID | None, limit: int) -> list[JobEvent]:
        """Events before the one with the id `after`.

        Raises:
            NotFound: The job has no event `after`.
        """
        query = select(JobEvent).where(JobEvent.job_id == job.id)
        if after is not None:
            query = query.where(JobEvent.sequence < self._place(JobEvent, job, after, "event"))
        return list(self._session.scalars(query.order_by(JobEvent.sequence.desc()).limit(limit)))

    def list_checkpoints(self, job: Job, *, after: UUID | None, limit: int) -> list[Checkpoint]:
        """Checkpoints before the one with the id `after`, without those found damaged.

        Raises:
            NotFound: The job has no checkpoint `after`.
        """
        query = select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.corrupt.is_(False))
        if after is not None:
            query = query.where(Checkpoint.seq < self._place(Checkpoint, job, after, "checkpoint"))
        return list(self._session.scalars(query.order_by(Checkpoint.seq.desc()).limit(limit)))

    def list_decisions(self, job: Job, *, after: UUID | None, limit: int) -> list[DecisionRow]:
        """Decisions before the one with the id `after`.

        Raises:
            NotFound: The job has no decision `after`.
        """
        query = select(DecisionRow).where(DecisionRow.job_id == job.id)
        if after is not None:
            query = query.where(DecisionRow.seq < self._place(DecisionRow, job, after, "decision"))
        return list(self._session.scalars(query.order_by(DecisionRow.seq.desc()).limit(limit)))

    def _place(
        self,
        table: type[JobEvent] | type[Checkpoint] | type[DecisionRow],
        job: Job,
        row_id: UUID,
        noun: str,
    ) -> int:
        column: Any = JobEvent.sequence if table is JobEvent else table.seq
        query: Select[Any] = select(column).where(table.id == row_id, table.job_id == job.id)
        place = self._session.scalar(query)
        if place is None:
            raise NotFound(f"after: the job has no {noun} with this id.", "after")
        return int(place)
