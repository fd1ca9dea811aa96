"""Fine-tuning jobs after submit: listed, cancelled, paused and resumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import func
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
from app.domain.states import JobState, StopRequest
from app.errors import Conflict
from app.services.events import add_job_event, add_transition


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


def cancel_job(session: Session, project_id: UUID, job_id: UUID) -> Job:
    """Cancels a job: at once when nobody runs it, else at its worker's next beat; asking again changes nothing.

    Raises:
        NotFound: The project has no such job.
        Conflict: The job has ended.
    """
    job = ProjectJobRepository(session).get(project_id, job_id, for_update=True)
    if job.state is JobState.CANCELLED:
        return job
    _refuse_ended(job, "cancelled")
    if job.state.is_leased:
        if job.stop_requested is not StopRequest.CANCEL:
            job.stop_requested = StopRequest.CANCEL
            session.flush()
            add_job_event(session, job, level="info", message="Cancelling was asked for.")
        session.refresh(job)
        return job
    job.finished_at = func.clock_timestamp()
    job.move_to(JobState.CANCELLED)
    session.flush()
    add_transition(session, job, JobState.CANCELLED, "The job is cancelled.")
    session.refresh(job)
    return job


def pause_job(session: Session, project_id: UUID, job_id: UUID) -> Job:
    """Has a running job save a checkpoint and free its GPUs; asking again changes nothing.

    Raises:
        NotFound: The project has no such job.
        Conflict: The job is not running, or is being cancelled.
    """
    job = ProjectJobRepository(session).get(project_id, job_id, for_update=True)
    if job.state in {JobState.PAUSING, JobState.PAUSED}:
        return job
    _refuse_ended(job, "paused")
    if job.state is not JobState.RUNNING:
        raise Conflict(
            f"A job that is {job.state.value} holds no GPU to free; cancel it, or pause it once it runs.",
            "status",
            "job_not_running",
        )
    if job.stop_requested is StopRequest.CANCEL:
        raise Conflict("The job is being cancelled.", "status", "job_cancelling")
    job.stop_requested = StopRequest.PAUSE
    job.move_to(JobState.PAUSING)
    session.flush()
    add_transition(session, job, JobState.PAUSING, "Pausing was asked for.")
    session.refresh(job)
    return job


def resume_job(session: Session, project_id: UUID, job_id: UUID) -> Job:
    """Queues a paused job again; it goes on from its last checkpoint. Asking again changes nothing.

    Raises:
        NotFound: The project has no such job.
        Conflict: The job is not paused.
    """
    repository = ProjectJobRepository(session)
    job = repository.get(project_id, job_id, for_update=True)
    if job.state in {JobState.QUEUED, JobState.RUNNING}:
        return job
    _refuse_ended(job, "resumed")
    if job.state is not JobState.PAUSED:
        raise Conflict(
            f"A job that is {job.state.value} cannot be resumed; wait until it is paused.",
            "status",
            "job_not_paused",
        )
    job.stop_requested = None
    job.not_before = func.clock_timestamp()
    job.move_to(JobState.QUEUED)
    session.flush()
    add_transition(session, job, JobState.QUEUED, "The job is queued again.")
    repository.ring_later(job)
    session.refresh(job)
    return job


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


def _refuse_ended(job: Job, what: str) -> None:
    if job.state.is_terminal:
        raise Conflict(
            f"The job has {job.state.value if job.state is not JobState.CANCELLED else 'been cancelled'}"
            f" and cannot be {what}.",
            "status",
            "job_ended",
        )
