"""The job object, and what a job has: events, checkpoints, the frontier."""

import math
import time
from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.schemas.base import Identified, Schema, unix, unix_or_none
from app.api.schemas.stages import ShownStage, ShownStudent, show_stages, show_student
from app.db.models import Checkpoint, Job, JobEvent
from app.domain.identifiers import checkpoint_name, model_version_name, public_id
from app.domain.policy import Policy
from app.domain.spec import DpoHyperparameters, JobSpec
from app.domain.states import JobState
from app.domain.strategies import StrategyConfig
from app.domain.submit import asked_hyperparameters
from app.services.jobs import ShownJob


class JobError(Schema):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class ShownHyperparameters(Schema):
    """OpenAI's three, `auto` resolved (but for a job whose files are still being checked)."""

    n_epochs: int | str
    batch_size: int | str
    learning_rate_multiplier: float | str


class ShownDpoHyperparameters(ShownHyperparameters):
    """Those of `dpo`."""

    beta: float | str


class ShownSupervised(Schema):
    """`method` with resolved values."""

    type: Literal["supervised"] = "supervised"
    supervised: dict[Literal["hyperparameters"], ShownHyperparameters]


class ShownDpo(Schema):
    """`method` with resolved values, of a job that compares answers."""

    type: Literal["dpo"] = "dpo"
    dpo: dict[Literal["hyperparameters"], ShownDpoHyperparameters]


ShownMethod = Annotated[ShownSupervised | ShownDpo, Field(discriminator="type")]


class ShownRetention(Schema):
    """What guards general ability: the strategies and the policy in force."""

    strategies: list[StrategyConfig]
    policy: Policy | None
    general_data: str | None


class ShownProgress(Schema):
    """How far a run is; `total_steps` are accepted steps."""

    step: int
    total_steps: int | None
    percentage_done: float | None
    seconds_remaining: float | None
    phase: str | None


class JobObject(Identified):
    """A fine-tuning job: OpenAI's keys, then Retain's."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    model: str
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    hyperparameters: ShownHyperparameters
    method: ShownMethod
    result_files: list[str]
    seed: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    trained_tokens: int | None
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str] | None
    user_provided_suffix: str | None

    retention: ShownRetention | None
    training: dict[str, Any]
    preset: str | None
    stages: list[ShownStage]
    student: ShownStudent | None
    resources: dict[str, Any]
    priority: int
    progress: ShownProgress
    strategies_why: str | None
    warnings: list[dict[str, Any]]
    data_checks: dict[str, Any] | None  # a DataChecks
    power: dict[str, Any] | None
    verdict: Any
    report: dict[str, Any] | None
    attempt: int
    branch: int
    stop_requested: str | None
    rerun_of: str | None
    started_at: int | None


class EventObject(Identified):
    """A line of a job's log."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None
    sequence: int


class CheckpointObject(Identified):
    """A saved training state; `status` says what the sensor found of it."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]
    status: str
    is_evaluated: bool
    superseded: bool
    attempt: int
    branch: int
    size_bytes: int


class FrontierObject(Schema):
    """The line from base (alpha 0) to tuned (alpha 1), measured at the job's end."""

    object: Literal["retention.frontier"] = "retention.frontier"
    fine_tuning_job_id: str
    data: list[dict[str, Any]]


def show_job(shown: ShownJob) -> JobObject:
    """A job as clients see it."""
    job, spec = shown.row, JobSpec.model_validate(shown.row.spec)
    numbers = _show_hyperparameters(job, spec)
    report = job.report or {}
    progress = _show_progress(job)
    return JobObject(
        id=public_id("job", job.id),
        created_at=unix(job.created_at),
        model=spec.start or shown.base,
        organization_id=public_id("project", job.project_id),
        status=job.state.value,
        training_file=spec.request.training_file,
        validation_file=spec.request.validation_file,
        hyperparameters=numbers,
        method=_show_method(job, spec, numbers),
        result_files=(
            [] if job.result_file_id is None else [public_id("file", job.result_file_id)]
        ),
        seed=job.seed,
        error=None if job.error is None else _show_error(job.error),
        fine_tuned_model=shown.version if shown.version_status == "ready" else None,
        finished_at=unix_or_none(job.finished_at),
        estimated_finish=_estimate_finish(job),
        trained_tokens=job.trained_tokens,
        metadata=job.metadata_,
        user_provided_suffix=job.suffix,
        retention=_show_retention(job, spec),
        training=spec.training.model_dump(mode="json"),
        preset=spec.request.preset,
        stages=show_stages(spec),
        student=show_student(spec),
        resources=spec.request.resources.model_dump(mode="json"),
        priority=job.priority,
        progress=progress,
        strategies_why=spec.strategies_why,
        warnings=job.warnings,
        data_checks=job.data_checks,
        power=job.power,
        verdict=report.get("verdict"),
        report=job.report,
        attempt=job.attempt,
        branch=job.branch,
        stop_requested=None if job.stop_requested is None else job.stop_requested.value,
        rerun_of=None if job.rerun_of_id is None else public_id("job", job.rerun_of_id),
        started_at=unix_or_none(job.started_at),
    )


def show_event(event: JobEvent) -> EventObject:
    """An event as clients see it."""
    return EventObject(
        id=public_id("event", event.id),
        created_at=unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
        sequence=event.sequence,
    )


def show_checkpoint(checkpoint: Checkpoint, shown: ShownJob) -> CheckpointObject:
    """A checkpoint as clients see it."""
    job = shown.row
    name = (
        model_version_name(shown.base, shown.project, job.suffix, job.id)
        if shown.version is None
        else shown.version
    )
    metrics: dict[str, Any] = {"step": checkpoint.step} | checkpoint.metrics
    if checkpoint.valid_loss is not None:
        metrics |= {"full_valid_loss": checkpoint.valid_loss}
    return CheckpointObject(
        id=public_id("checkpoint", checkpoint.id),
        created_at=unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint_name(name, checkpoint.step),
        fine_tuning_job_id=public_id("job", job.id),
        step_number=checkpoint.step,
        metrics=metrics,
        status=checkpoint.status.value,
        is_evaluated=checkpoint.is_evaluated,
        superseded=checkpoint.superseded,
        attempt=checkpoint.attempt,
        branch=checkpoint.branch,
        size_bytes=checkpoint.size_bytes,
    )


def _show_hyperparameters(job: Job, spec: JobSpec) -> ShownHyperparameters:
    asked = asked_hyperparameters(spec.request)
    if job.state is JobState.VALIDATING_FILES:
        return ShownHyperparameters.model_validate(asked.model_dump(exclude={"beta"}))
    multiplier = asked.learning_rate_multiplier
    return ShownHyperparameters(
        n_epochs=spec.training.n_epochs,
        batch_size=spec.training.batch_size,
        learning_rate_multiplier=1.0 if isinstance(multiplier, str) else multiplier,
    )


def _show_method(
    job: Job, spec: JobSpec, numbers: ShownHyperparameters
) -> ShownSupervised | ShownDpo:
    asked = asked_hyperparameters(spec.request)
    if not isinstance(asked, DpoHyperparameters):
        return ShownSupervised(supervised={"hyperparameters": numbers})
    is_open = job.state is JobState.VALIDATING_FILES or spec.training.beta is None
    beta = asked.beta if is_open else spec.training.beta
    shown = ShownDpoHyperparameters.model_validate(numbers.model_dump() | {"beta": beta})
    return ShownDpo(dpo={"hyperparameters": shown})


def _show_error(error: dict[str, Any]) -> JobError:
    return JobError(
        code=str(error.get("code")),
        message=str(error.get("message")),
        param=error.get("param"),
    )


def _show_retention(job: Job, spec: JobSpec) -> ShownRetention | None:
    if spec.is_unwatched_by_wish:
        return None
    asked = spec.request.retention  # None: off, and watched all the same as the project requires it
    general = job.general_file_id
    return ShownRetention(
        strategies=list(spec.strategies),
        policy=spec.policy,
        # The base model's own general data is the operator's file, which no project may name.
        general_data=(
            None
            if asked is None or asked.general_data is None or general is None
            else public_id("file", general)
        ),
    )


def _show_progress(job: Job) -> ShownProgress:
    told = job.progress or {}
    step = job.step
    total = job.total_steps
    if job.state is JobState.RUNNING and isinstance(told.get("step"), int):
        step = told["step"]  # the row's own step moves at checkpoints alone
    is_over = job.state is JobState.SUCCEEDED
    share = None if not total else min(100.0 * step / total, 100.0)
    return ShownProgress(
        step=step,
        total_steps=total,
        percentage_done=100.0 if is_over else share,
        seconds_remaining=0.0 if job.state.is_terminal else _seconds_left(job),
        phase=None if job.state.is_terminal else told.get("phase"),
    )


def _estimate_finish(job: Job) -> int | None:
    """Never in the past while the job runs; null before its trainer has measured enough, and while it waits."""
    finish = (job.progress or {}).get("finish_at") if job.state.is_leased else None
    return None if finish is None else math.ceil(max(finish, time.time()))


def _seconds_left(job: Job) -> float | None:
    finish = (job.progress or {}).get("finish_at") if job.state.is_leased else None
    return None if finish is None else round(max(finish - time.time(), 0.0), 1)
