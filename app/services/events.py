"""A job's log: gapless events, and the webhook of a transition beside its line."""

from typing import Any, Literal

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db.models import Job, JobEvent
from app.domain.states import JobKind, JobState
from app.services.webhooks import emit_event

Level = Literal["info", "warn", "error"]

#: States whose coming is told by webhook; `validating_files` is where a job begins.
TOLD = frozenset(JobState) - {JobState.VALIDATING_FILES}


def add_job_event(
    session: Session,
    job: Job,
    *,
    level: Level,
    message: str,
    type: Literal["message", "metrics"] = "message",  # noqa: A002 - the API's word
    data: dict[str, Any] | None = None,
) -> JobEvent:
    """Appends a line to a job's log.

    The number comes from the job's row, whose lock is held until the transaction ends: so the numbers have no
    gap, and a reader that has seen n has seen all before it.
    """
    sequence = session.execute(
        update(Job)
        .where(Job.id == job.id)
        .values(event_count=Job.event_count + 1)
        .returning(Job.event_count)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    session.expire(job, ["event_count"])
    event = JobEvent(
        job_id=job.id, sequence=sequence, level=level, type=type, message=message, data=data
    )
    session.add(event)
    session.flush()
    return event


def add_transition(
    session: Session,
    job: Job,
    state: JobState,
    message: str,
    *,
    level: Level = "info",
    data: dict[str, Any] | None = None,
) -> JobEvent:
    """Writes down that a job has come to a state: a line of its log, and the event its receivers get."""
    event = add_job_event(
        session, job, level=level, message=message, data={"status": state.value} | (data or {})
    )
    if job.kind is JobKind.FINE_TUNING and state in TOLD:
        emit_event(
            session,
            project_id=job.project_id,
            type=f"fine_tuning.job.{state.value}",
            data={"status": state.value, "message": message} | (data or {}),
            job=job,
        )
    return event
