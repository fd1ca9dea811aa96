"""Fine-tuning jobs and their history, as clients read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Checkpoint, DecisionRow, Job, JobEvent
from app.db.repositories.project_jobs import JobHistoryRepository, ProjectJobRepository
from app.errors import NotFound


@dataclass(frozen=True, slots=True)
class ShownJob:
    """A job with the names that its object shows beside its own fields."""

    row: Job
    base: str
    project: str
    version: str | None  # what it published, or is about to
    version_status: str | None


def get_job(session: Session, project_id: UUID, job_id: UUID) -> Job:
    """One fine-tuning job.

    Raises:
        NotFound: The project has no such job.
    """
    return ProjectJobRepository(session).get(project_id, job_id)


def find_job(session: Session, project_id: UUID, job_id: UUID) -> ShownJob:
    """One fine-tuning job as it is shown.

    Raises:
        NotFound: The project has no such job.
    """
    found = ProjectJobRepository(session).find_shown(project_id, job_id)
    if found is None:
        raise NotFound("No fine-tuning job has this id.", "fine_tuning_job_id")
    return ShownJob(*found)


def list_jobs(
    session: Session,
    project_id: UUID,
    *,
    after: UUID | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
) -> tuple[list[ShownJob], bool]:
    """A page of fine-tuning jobs as they are shown, newest first, and whether there are more.

    Raises:
        NotFound: `after` is not a job of the project.
    """
    repository = ProjectJobRepository(session)
    place = None
    if after is not None:
        place = repository.find_place(project_id, after)
        if place is None:
            raise NotFound("No fine-tuning job has this id.", "fine_tuning_job_id")
    found = repository.list_shown(
        project_id,
        before=place,
        limit=limit + 1,
        metadata=metadata,
        without_metadata=without_metadata,
    )
    return [ShownJob(*row) for row in found[:limit]], len(found) > limit


def as_shown(session: Session, job: Job) -> ShownJob:
    """A job of this session as it is shown."""
    return ShownJob(*ProjectJobRepository(session).show(job))


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
