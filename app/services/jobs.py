"""Fine-tuning jobs and their history, as clients read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import (
    BaseModel,
    Checkpoint,
    DecisionRow,
    Job,
    JobEvent,
    ModelVersion,
    Project,
)
from app.db.repositories.project_jobs import JobHistoryRepository, ProjectJobRepository


@dataclass(frozen=True, slots=True)
class ShownJob:
    """A job with the rows that its object shows beside its own."""

    row: Job
    base: BaseModel
    project: Project
    version: ModelVersion | None


def get_job(session: Session, project_id: UUID, job_id: UUID) -> Job:
    """One fine-tuning job.

    Raises:
        NotFound: The project has no such job.
    """
    return ProjectJobRepository(session).get(project_id, job_id)


def list_jobs(
    session: Session,
    project_id: UUID,
    *,
    after: UUID | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
) -> tuple[list[Job], bool]:
    """A page of fine-tuning jobs, newest first, and whether there are more.

    Raises:
        NotFound: `after` is not a job of the project.
    """
    repository = ProjectJobRepository(session)
    last = None if after is None else repository.get(project_id, after)
    found = repository.list_page(
        project_id,
        after=last,
        limit=limit + 1,
        metadata=metadata,
        without_metadata=without_metadata,
    )
    return found[:limit], len(found) > limit


def show_jobs(session: Session, jobs: list[Job]) -> list[ShownJob]:
    """Jobs of one project with the rows that their objects show beside their own."""
    if not jobs:
        return []
    repository = ProjectJobRepository(session)
    project = repository.get_project(jobs[0].project_id)
    bases = repository.base_models(jobs)
    versions = repository.model_versions(jobs)
    return [
        ShownJob(
            job,
            bases[job.base_model_id],
            project,
            None if job.model_version_id is None else versions[job.model_version_id],
        )
        for job in jobs
    ]


def list_events(
    session: Session, job: Job, *, after: UUID | None, limit: int
) -> tuple[list[JobEvent], bool]:
    """A page of a job's log, newest first, and whether there is more.

    Raises:
        NotFound: The job has no event `after`.
    """
    found = JobHistoryRepository(session).list_events(job, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def list_checkpoints(
    session: Session, job: Job, *, after: UUID | None, limit: int
) -> tuple[list[Checkpoint], bool]:
    """A page of a job's checkpoints, newest first, and whether there are more.

    Raises:
        NotFound: The job has no checkpoint `after`.
    """
    found = JobHistoryRepository(session).list_checkpoints(job, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def list_decisions(
    session: Session, job: Job, *, after: UUID | None, limit: int
) -> tuple[list[DecisionRow], bool]:
    """A page of a job's decisions, newest first, and whether there are more.

    Raises:
        NotFound: The job has no decision `after`.
    """
    found = JobHistoryRepository(session).list_decisions(job, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit
