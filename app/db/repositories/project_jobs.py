"""Queries on jobs as clients see them: their rows, events, checkpoints and decisions."""

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, Select, bindparam, func, select
from sqlalchemy.orm import Session, load_only

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
from app.domain.states import JobKind
from app.errors import NotFound

#: A job; the names of its base model and project; name and status of its version, if it has one.
ShownRow = Row[Job, str, str, str | None, str | None]

MAX_SEQ: Final = 2**63 - 1
# Made once: these are asked most, and putting a query together costs a fifth of what it takes to run it.
_SHOWN: Final = (
    select(Job, BaseModel.name, Project.name, ModelVersion.name, ModelVersion.status)
    .join(BaseModel, BaseModel.id == Job.base_model_id)
    .join(Project, Project.id == Job.project_id)
    .outerjoin(ModelVersion, ModelVersion.id == Job.model_version_id)
    .where(Job.project_id == bindparam("project_id"))
)
#: Columns that no job object shows are left where they are; a run plan may be large.
_SHOWN_COLUMNS: Final = (
    Job.created_at,
    Job.project_id,
    Job.state,
    Job.spec,
    Job.warnings,
    Job.data_checks,
    Job.power,
    Job.general_file_id,
    Job.metadata_,
    Job.suffix,
    Job.seed,
    Job.priority,
    Job.attempt,
    Job.stop_requested,
    Job.branch,
    Job.step,
    Job.total_steps,
    Job.event_count,
    Job.progress,
    Job.trained_tokens,
    Job.started_at,
    Job.finished_at,
    Job.error,
    Job.result_file_id,
    Job.report,
    Job.rerun_of_id,
)
_BRIEF: Final = _SHOWN.where(Job.kind == JobKind.FINE_TUNING).options(
    load_only(*_SHOWN_COLUMNS, raiseload=True)
)
SHOWN_JOB: Final = _BRIEF.where(Job.id == bindparam("job_id"))
SHOWN_PAGE: Final = (
    _BRIEF.where(Job.seq < bindparam("before")).order_by(Job.seq.desc()).limit(bindparam("limit"))
)


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

    def find_shown(self, project_id: UUID, job_id: UUID) -> ShownRow | None:
        """The fine-tuning job with this id, and the names it is shown with."""
        ids = {"project_id": project_id, "job_id": job_id}
        return self._session.execute(SHOWN_JOB, ids).one_or_none()

    def list_shown(
        self,
        project_id: UUID,
        *,
        before: int | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Sequence[ShownRow]:
        """Fine-tuning jobs before a place, newest first; `metadata` keeps those that hold all its pairs."""
        query = SHOWN_PAGE
        if metadata:
            query = query.where(Job.metadata_.contains(dict(metadata)))
        if without_metadata:
            query = query.where(func.coalesce(Job.metadata_, func.jsonb("{}")) == {})
        values = {"project_id": project_id, "before": before or MAX_SEQ, "limit": limit}
        return self._session.execute(query, values).all()

    def find_place(self, project_id: UUID, job_id: UUID) -> int | None:
        """Where a fine-tuning job stands among the others."""
        return self._session.scalar(
            select(Job.seq).where(
                Job.id == job_id, Job.project_id == project_id, Job.kind == JobKind.FINE_TUNING
            )
        )

    def show(self, job: Job) -> ShownRow:
        """A job of whatever state in this session, and the names it is shown with."""
        return self._session.execute(
            _SHOWN.where(Job.id == job.id), {"project_id": job.project_id}
        ).one()

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
