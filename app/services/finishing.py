"""The end of a run: final verdict, model version, result file and state in one fenced transaction."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from app.db.models import BaseModel, File, Job, ModelVersion, Project
from app.domain.decisions import ControllerState, Reading
from app.domain.identifiers import model_version_name, parse_id
from app.domain.messages import ExportFinished, Finished
from app.domain.publishing import judge_publication
from app.domain.spec import ExportSpec, JobSpec
from app.domain.states import JobState
from app.services.engine import end_failed, end_lease, hold
from app.services.estimates import keep_measured
from app.services.events import add_job_event, add_transition
from app.services.files import PROCESSED, RESULTS
from app.services.monitoring import FinalVerdict, final_verdict, judge_scores
from app.services.storage import Stored


@dataclass(frozen=True, slots=True)
class Uploads:
    """What was stored before the transaction that makes it count."""

    artifact: Stored | None
    result: Stored | None


def finish_job(
    session: Session, job_id: UUID, attempt: int, message: Finished, uploads: Uploads
) -> JobState:
    """Ends a run: succeeded with its model version, or failed because retention could not be met.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    job = hold(session, job_id, attempt)
    verdict = final_verdict(session, job, message)
    job.result_file_id = _add_result(session, job, uploads.result)
    job.trained_tokens = message.trained_tokens
    job.report = _report(job, message, verdict)
    keep_measured(session, job, message.measured)
    artifact, retention = uploads.artifact, verdict.publication.retention
    if (
        artifact is None
        or message.failure is not None
        or not verdict.publication.publish
        or retention is None
    ):
        end_failed(
            session,
            job,
            code=verdict.publication.failure or "retention_not_met",
            message=f"Nothing is published. {_why_failed(message, verdict)}",
            param=None,
        )
        return job.state
    version = _add_version(session, job, message, artifact, verdict, retention)
    job.model_version_id = version.id
    end_lease(job, JobState.SUCCEEDED)
    session.flush()
    add_job_event(
        session,
        job,
        level="info",
        message=f"New fine-tuned model created: {version.name}",
        data={"code": "model_created", "model": version.name, "retention": retention},
    )
    add_transition(
        session,
        job,
        job.state,
        "The job has successfully completed.",
        data={
            "fine_tuned_model": version.name,
            "retention": retention,
            "reason": verdict.publication.reason,
        },
    )
    return job.state


def finish_export(
    session: Session, job_id: UUID, attempt: int, message: ExportFinished, artifact: Stored
) -> JobState:
    """Fills the pending model version of an export job; the report test gives its word on retention.

    Raises:
        Fenced: The attempt no longer holds the job.
    """
    job = hold(session, job_id, attempt)
    spec = ExportSpec.model_validate(job.spec)
    source = session.get_one(Job, parse_id("job", spec.source_job_id))
    source_spec = JobSpec.model_validate(source.spec)
    reading = judge_scores(session, source, message.report, message.merged_baseline)
    publication = judge_publication(
        source_spec.policy,
        reading,
        alpha=spec.alpha,
        is_off=source_spec.is_unwatched_by_wish,
    )
    version = session.get_one(ModelVersion, UUID(spec.model_version_id))
    version.kind = message.artifact_kind
    version.path, version.sha256 = artifact.path, artifact.sha256
    version.size_bytes = artifact.size_bytes
    version.verdict = _dump(reading)
    version.reason = publication.reason
    if publication.retention is None:
        version.status = "failed"
        session.flush()
        code = publication.failure or "retention_not_met"
        end_failed(session, job, code=code, message=publication.reason, param=None)
        return job.state
    version.status = "ready"
    version.retention = publication.retention
    end_lease(job, JobState.SUCCEEDED)
    session.flush()
    add_transition(session, job, job.state, f"{version.name} is ready.")
    return job.state


def _add_result(session: Session, job: Job, stored: Stored | None) -> UUID | None:
    if stored is None:
        return None
    file = File(
        id=uuid4(),
        project_id=job.project_id,
        filename="step_metrics.csv",
        purpose=RESULTS,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        path=stored.path,
        status=PROCESSED,
    )
    session.add(file)
    session.flush()
    return file.id


def _add_version(
    session: Session,
    job: Job,
    message: Finished,
    artifact: Stored,
    verdict: FinalVerdict,
    retention: str,
) -> ModelVersion:
    version_id = uuid4()
    base = session.get_one(BaseModel, job.base_model_id)
    project = session.get_one(Project, job.project_id)
    version = ModelVersion(
        id=version_id,
        project_id=job.project_id,
        name=model_version_name(base.name, project.name, job.suffix, version_id),
        base_model_id=base.id,
        parent_version_id=job.start_version_id,
        job_id=job.id,
        checkpoint_id=UUID(message.checkpoint_id),
        status="ready",
        kind=message.artifact_kind,
        alpha=message.alpha,
        path=artifact.path,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        retention=retention,
        verdict=_dump(verdict.published),
        reason="could_not_hold" if _could_not_hold(job) else verdict.publication.reason,
    )
    session.add(version)
    session.flush()
    return version


def _report(job: Job, message: Finished, verdict: FinalVerdict) -> dict[str, Any]:
    """What the job's owner reads of its end."""
    return {
        "retention": verdict.publication.retention,
        "reason": verdict.publication.reason,
        "could_not_hold": _could_not_hold(job),
        "alpha": message.alpha,
        "checkpoint_id": message.checkpoint_id or None,
        "valid_loss": message.valid_loss,
        "verdict": _dump(verdict.published),
        "tuned_verdict": _dump(verdict.tuned),
        "frontier": [point.model_dump(mode="json") for point in message.frontier],
        "seconds": message.seconds,
    }


def _why_failed(message: Finished, verdict: FinalVerdict) -> str:
    if verdict.publication.failure is not None:
        return verdict.publication.reason
    if message.checkpoint_id:
        return "No point of the line from base to tuned holds and gains anything on the domain."
    return "No checkpoint of the job may be published under its policy."


def _could_not_hold(job: Job) -> bool:
    state = job.controller_state
    return state is not None and ControllerState.model_validate(state).could_not_hold


def _dump(reading: Reading | None) -> dict[str, Any] | None:
    return None if reading is None else reading.model_dump(mode="json")
