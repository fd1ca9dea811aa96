"""What a client may ask of a job: cancel, pause, resume."""

from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import Job
from app.db.repositories.jobs import JobRepository
from app.domain.identifiers import public_id
from app.domain.states import JobState, StopRequest
from app.errors import Conflict, NotFound
from app.services.events import add_job_event, add_transition


def request_cancel(session: Session, *, project_id: UUID, job_id: UUID) -> Job:
    """Cancels a job: at once when nobody works on it, else its worker hears of it at the next heartbeat.

    Raises:
        NotFound: The project has no such job.
        Conflict: It is over.
    """
    job = _lock(session, project_id, job_id)
    if job.state.is_terminal:
        raise Conflict(f"The job is {job.state.value} already.", "status", "job_already_ended")
    if job.state.is_leased:
        if job.stop_requested is not StopRequest.CANCEL:
            job.stop_requested = StopRequest.CANCEL
            session.flush()
            add_job_event(
                session,
                job,
                level="info",
                message="Cancellation requested.",
                data={"code": "cancel_requested"},
            )
        return job
    job.move_to(JobState.CANCELLED)
    job.finished_at = func.clock_timestamp()
    job.stop_requested = None
    session.flush()
    add_transition(
        session, job, job.state, "Fine-tuning job cancelled.", data={"code": "cancelled"}
    )
    return job


def request_pause(session: Session, *, project_id: UUID, job_id: UUID) -> Job:
    """Asks a running job to save and stop; it is `pausing` until it has, then `paused`.

    Raises:
        NotFound: The project has no such job.
        Conflict: It is not running, or is being cancelled.
    """
    job = _lock(session, project_id, job_id)
    if job.state in {JobState.PAUSING, JobState.PAUSED}:
        return job
    if job.stop_requested is StopRequest.CANCEL:
        raise Conflict("The job is being cancelled.", "status")
    job.move_to(JobState.PAUSING)
    job.stop_requested = StopRequest.PAUSE
    session.flush()
    add_transition(session, job, job.state, "Pause requested.", data={"code": "pause_requested"})
    return job


def resume_job(session: Session, *, project_id: UUID, job_id: UUID) -> Job:
    """Puts a paused job back into the queue; it goes on from where it was saved.

    Raises:
        NotFound: The project has no such job.
        Conflict: It is not paused.
    """
    job = _lock(session, project_id, job_id)
    if job.state is not JobState.PAUSED:  # running and validating_files lead to queued too
        raise Conflict(f"A job that is {job.state.value} cannot be resumed.", "status")
    job.move_to(JobState.QUEUED)
    job.not_before = func.clock_timestamp()
    job.last_rung_at = None
    JobRepository(session).add_bell(job.id)
    session.flush()
    add_transition(session, job, job.state, "Fine-tuning job queued.", data={"code": "resumed"})
    return job


def _lock(session: Session, project_id: UUID, job_id: UUID) -> Job:
    job = JobRepository(session).lock(job_id)
    if job is None or job.project_id != project_id:
        raise NotFound(f"No job has the id '{public_id('job', job_id)}'.")
    return job
