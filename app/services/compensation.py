"""Compensation jobs: submitted as any job is, once for each regressed version."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Compensation, Job, ModelVersion, Monitor
from app.db.repositories.monitors import MonitorRepository
from app.domain.compensation import plan_compensation
from app.domain.decisions import ControllerState
from app.domain.identifiers import public_id
from app.domain.monitors import MonitorSettings
from app.domain.spec import JobSpec
from app.domain.states import JobKind
from app.errors import BadRequest, Conflict, NotFound, QuotaExceeded
from app.services.events import add_job_event
from app.services.submission import submit_job


class Compensated(NamedTuple):
    """The job that makes up for a version's regression, or why there is none."""

    job_id: UUID | None
    is_new: bool
    problem: str | None = None


def compensate(
    session: Session,
    monitor: Monitor,
    model: ModelVersion,
    settings: MonitorSettings,
    *,
    max_queued: int,
) -> Compensated:
    """Submits the job that makes up for a version's regression, unless there is one already.

    What can't be submitted (a file is gone, the queue is full) is told and leaves nothing behind: taking the
    alias off the version does not wait for it.
    """
    # Monitors of several aliases may come for one version at once.
    session.execute(select(ModelVersion.id).where(ModelVersion.id == model.id).with_for_update())
    repository = MonitorRepository(session)
    known = repository.find_compensation(model.id)
    if known is not None:
        return Compensated(known.job_id, is_new=False)
    source = session.get_one(Job, model.job_id)
    if source.kind is not JobKind.FINE_TUNING:
        return Compensated(None, is_new=False, problem="the version was not trained here")
    strengths = {}
    if source.controller_state is not None:
        strengths = ControllerState.model_validate(source.controller_state).strengths
    plan = plan_compensation(JobSpec.model_validate(source.spec), strengths, settings)
    try:
        with session.begin_nested():
            job = submit_job(session, source.project_id, plan.request, max_queued=max_queued)
            row = Compensation(
                project_id=source.project_id,
                model_version_id=model.id,
                monitor_id=monitor.id,
                job_id=job.id,
                lever=plan.lever,
                change=plan.change,
            )
            repository.add(row)
            add_job_event(
                session,
                job,
                level="info",
                message=f"This job makes up for a regression of {model.name}: {plan.change}.",
                data={
                    "code": "compensation",
                    "model": model.name,
                    "monitor_id": public_id("monitor", monitor.id),
                    "lever": plan.lever,
                },
            )
    except (BadRequest, NotFound, Conflict, QuotaExceeded) as error:
        return Compensated(None, is_new=False, problem=error.message)
    return Compensated(job.id, is_new=True)
