"""Running a job again: the same request from the same start, or from one of its checkpoints."""

from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Job
from app.db.repositories.project_jobs import ProjectJobRepository
from app.domain.identifiers import checkpoint_name, model_version_name, parse_id
from app.domain.requests import RerunJob
from app.domain.spec import CreateJob, JobSpec
from app.errors import Conflict, NotFound


def plan_rerun(session: Session, project_id: UUID, job_id: UUID, body: RerunJob) -> CreateJob:
    """The request that runs an ended job again, with the seed that it had.

    An alias that the job named may point elsewhere by now: what it meant then is meant again. From a checkpoint
    the weights are taken up, not the optimiser's state: it is a run of its own.

    Raises:
        NotFound: The project has no such job, or the job keeps no such checkpoint.
        Conflict: The job has not ended.
    """
    job = ProjectJobRepository(session).get(project_id, job_id)
    if not job.state.is_terminal:
        raise Conflict(
            f"The job is {job.state.value}; it can be run again once it has ended.",
            "fine_tuning_job_id",
            "job_not_ended",
        )
    spec = JobSpec.model_validate(job.spec)
    changes: dict[str, object] = {
        "model": spec.start or spec.request.model,
        "seed": job.seed,
    }
    if body.from_checkpoint is not None:
        changes["model"] = _name_of(session, job, body.from_checkpoint)
    if "metadata" in body.model_fields_set:
        changes["metadata"] = body.metadata
    return spec.request.model_copy(update=changes)


def _name_of(session: Session, job: Job, checkpoint_id: str) -> str:
    """The model name of one of the job's checkpoints."""
    key = parse_id("checkpoint", checkpoint_id, param="from_checkpoint")
    found = session.get(Checkpoint, key)
    if (
        found is None
        or found.job_id != job.id
        or found.deleted_at
        or found.superseded
        or found.corrupt
    ):
        raise NotFound(
            f"from_checkpoint: the job keeps no checkpoint '{checkpoint_id}'.",
            "from_checkpoint",
            "checkpoint_not_found",
        )
    jobs = ProjectJobRepository(session)
    base = jobs.base_models([job])[job.base_model_id]
    project = jobs.get_project(job.project_id)
    return checkpoint_name(
        model_version_name(base.name, project.name, job.suffix, job.id), found.step
    )
