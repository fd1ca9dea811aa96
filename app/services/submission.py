"""Submitting a job: a request becomes a frozen spec, and job, events and doorbell are written together."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.orm import Session

from app.db.models import BaseModel, File, Job, Project
from app.db.repositories.files import FileRepository
from app.db.repositories.history import HistoryRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.domain.benchmarks import DEFAULT_GATE_ITEMS
from app.domain.conflicts import Surroundings, check_conflicts
from app.domain.data_checks import DataFinding
from app.domain.identifiers import parse_id
from app.domain.methods import GENERAL_DATA, check_formats, check_stages, is_preference
from app.domain.policy import VALID_LOSS, Policy
from app.domain.power import PlannedBenchmark, Power, power
from app.domain.spec import CreateJob, JobSpec
from app.domain.staging import resolve_stages, stage_files
from app.domain.states import JobKind, JobState
from app.domain.submit import (
    ResolvedStrategies,
    resolve_policy,
    resolve_strategies,
    resolve_training,
)
from app.errors import BadRequest, NotFound
from app.services.data_checks import check_data
from app.services.evaluations import baseline_key, unpack_bytes
from app.services.events import add_job_event, add_transition
from app.services.files import FINE_TUNE, PROCESSED
from app.services.named_models import check_named_models
from app.services.quotas import check_queue
from app.services.start import Start, check_start, find_start, start_of
from app.services.submit_warnings import warn_of_floors, warn_of_spec
from app.services.watched import Watched, pin_metric, required_policy, resolve_watched, tighten

GUESSED_ROW_BYTES: Final = 512  # of a file that is still being checked; settled when it is


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files that a job reads."""

    training: File
    validation: File | None
    general: File | None  # None: the job names none and the base model has none
    stages: dict[str, File]  # those that stages name, by public id

    @property
    def is_checked(self) -> bool:
        """Whether every file's lines have been checked."""
        files = (self.training, self.validation, self.general, *self.stages.values())
        return all(file is None or file.status == PROCESSED for file in files)

    def by_param(self, body: CreateJob) -> dict[str, File]:
        """The files whose rows are trained or validated on, by the field that named each."""
        found = {"training_file": self.training}
        found |= {param: self.stages[text] for param, text in stage_files(body)}
        return found if self.validation is None else found | {"validation_file": self.validation}

    def formats(self, body: CreateJob) -> dict[str, str]:
        """How the rows of those that are checked are written, by field."""
        files = self.by_param(body)
        if self.general is not None:
            files[GENERAL_DATA] = self.general
        reports = {param: file.report or {} for param, file in files.items()}
        return {param: told["format"] for param, told in reports.items() if "format" in told}


class ResolvedJob(NamedTuple):
    """A request with all that it leaves open, before anything is written."""

    start: Start
    files: JobFiles
    spec: JobSpec
    watched: tuple[Watched, ...]
    chosen: ResolvedStrategies


def submit_job(
    session: Session,
    project_id: UUID,
    body: CreateJob,
    *,
    max_queued: int = 100,
    found_before: Sequence[dict[str, Any]] = (),
    leaks: tuple[DataFinding, ...] = (),
) -> Job:
    """Validates a request into a frozen spec and writes job, events and doorbell; the caller commits all at once.

    Args:
        session: The caller's transaction.
        project_id: Whose job it is.
        body: The request.
        max_queued: Jobs that may wait, of a project without a quota of its own.
        found_before: Warnings that took reading files, which no transaction waits for.
        leaks: What the validation file shares with the training file, read before as well.

    Raises:
        NotFound: No such model, file or benchmark for this project; `param` names the field.
        BadRequest: What was asked for cannot be; `param` names the field.
        QuotaExceeded: Too many jobs of the project wait already.
    """
    jobs = ProjectJobRepository(session)
    project = jobs.get_project(project_id)
    check_queue(session, project_id, max_queued)
    start, files, spec, watched, chosen = resolve_job(session, project, body)
    base = start.base
    warnings = [*warn_of_spec(spec, watched, chosen), *found_before]
    found = _estimate_power(session, start, spec, watched)
    if found is not None:
        warnings += warn_of_floors(found)
    job = Job(
        project_id=project_id,
        kind=JobKind.FINE_TUNING,
        state=JobState.QUEUED if files.is_checked else JobState.VALIDATING_FILES,
        spec=spec.model_dump(mode="json"),
        warnings=warnings,
        data_checks=check_data(
            base,
            files.by_param(body),
            max_seq_length=spec.training.max_seq_length,
            leaks=leaks,
        ).model_dump(mode="json"),
        power=None if found is None else found.model_dump(mode="json"),
        base_model_id=base.id,
        start_version_id=None if start.version is None else start.version.id,
        start_checkpoint_id=None if start.checkpoint is None else start.checkpoint.id,
        training_file_id=files.training.id,
        validation_file_id=None if files.validation is None else files.validation.id,
        general_file_id=None if files.general is None else files.general.id,
        metadata_=body.metadata,
        suffix=body.suffix,
        seed=spec.training.seed,
        priority=body.priority,
        num_gpus=body.resources.num_gpus,
        total_steps=spec.training.total_steps if files.is_checked else None,
    )
    jobs.add(job)
    _tell_of_submit(session, job, spec)
    if job.state is JobState.QUEUED:
        jobs.ring_later(job)
    session.refresh(job)
    return job


def resolve_job(session: Session, project: Project, body: CreateJob) -> ResolvedJob:
    """What a request means; nothing is written.

    Raises:
        NotFound: No such model, file or benchmark for this project; `param` names the field.
        BadRequest: What was asked for cannot be; `param` names the field.
    """
    if body.retention is None and project.retention_mandatory:
        raise BadRequest(
            "retention: the project requires it; leave it out or give an object.",
            "retention",
            "retention_mandatory",
        )
    start = find_start(session, project.id, body.model)
    files = _find_files(session, project.id, start.base, body)
    spec, watched, chosen = _resolve(session, project, start, files, body)
    return ResolvedJob(start, files, spec, watched, chosen)


def settle_validation(session: Session, job: Job) -> bool:
    """Moves a job on whose files have been checked meanwhile; for the reconciler.

    Args:
        session: The caller's transaction.
        job: In `validating_files`, its row locked.

    Returns:
        False while a file is still being checked.
    """
    spec = JobSpec.model_validate(job.spec)
    start = start_of(session, job)
    try:
        files = _find_files(session, job.project_id, start.base, spec.request)
        if not files.is_checked:
            return False
        project = ProjectJobRepository(session).get_project(job.project_id)
        spec, _, _ = _resolve(session, project, start, files, spec.request, seed=job.seed)
    except (BadRequest, NotFound) as error:
        job.error = {"code": error.code, "message": error.message, "param": error.param}
        job.finished_at = func.clock_timestamp()
        job.move_to(JobState.FAILED)
        session.flush()
        add_transition(session, job, JobState.FAILED, error.message, level="error")
        return True
    job.spec = spec.model_dump(mode="json")
    job.total_steps = spec.training.total_steps
    job.move_to(JobState.QUEUED)
    session.flush()
    add_transition(session, job, JobState.QUEUED, "The files are valid; the job is queued.")
    ProjectJobRepository(session).ring_later(job)
    return True


def _find_files(session: Session, project_id: UUID, base: BaseModel, body: CreateJob) -> JobFiles:
    """The job's files, kept from being deleted until the transaction ends."""
    training = _find_rows(session, project_id, body.training_file, "training_file")
    validation = (
        None
        if body.validation_file is None
        else _find_rows(session, project_id, body.validation_file, "validation_file")
    )
    general = None
    if body.retention is not None and body.retention.general_data is not None:
        general = _find_rows(
            session, project_id, body.retention.general_data, "retention.general_data"
        )
    elif base.general_file_id is not None and body.retention is not None:
        general = FileRepository(session).get(None, base.general_file_id, share=True)
    stages = {
        text: _find_rows(session, project_id, text, param) for param, text in stage_files(body)
    }
    return JobFiles(training, validation, general, stages)


def _find_rows(session: Session, project_id: UUID, text: str, param: str) -> File:
    try:
        file_id = parse_id("file", text, param=param)
    except NotFound as error:
        raise NotFound(f"{param}: {error.message}", param, "file_not_found") from None
    file = FileRepository(session).get(project_id, file_id, param=param, share=True)
    if file.purpose != FINE_TUNE:
        raise BadRequest(
            f"{param}: its purpose is '{file.purpose}'; upload training rows for '{FINE_TUNE}'.",
            param,
            "invalid_file_purpose",
        )
    if file.status == "error":
        raise BadRequest(
            f"{param}: the file is not valid: {file.status_details}", param, "invalid_file"
        )
    return file


def _resolve(
    session: Session,
    project: Project,
    start: Start,
    files: JobFiles,
    body: CreateJob,
    *,
    seed: int | None = None,
) -> tuple[JobSpec, tuple[Watched, ...], ResolvedStrategies]:
    """The spec, what it watches, and what was chosen for it."""
    base = start.base
    check_stages(body)
    check_formats(body, files.formats(body))
    training = resolve_training(
        body,
        num_rows=_num_rows(files.training),
        context_length=base.details.get("context_length"),
        seed=secrets.randbelow(2**31) if seed is None else seed,
    )
    chosen = resolve_strategies(
        body.retention,
        lora=training.type == "lora",
        has_general_data=files.general is not None,
        num_parameters=base.details.get("num_parameters"),
        memory_gb=body.resources.memory_gb,
        is_roadmap=body.preset == "roadmap",
    )
    check_named_models(session, project.id, chosen.strategies)
    check_start(start, chosen.strategies)
    rows = {text: _num_rows(file) for text, file in files.stages.items()}
    staged = resolve_stages(
        body,
        training,
        chosen.strategies,
        {body.training_file: _num_rows(files.training)} | rows,
    )
    check_conflicts(
        chosen.strategies,
        Surroundings(
            lora=training.type == "lora",
            late_adapter=staged.training.late_adapter,
            no_rows_kept=body.retention is not None and body.retention.privacy == "no_rows_kept",
            num_parameters=base.details.get("num_parameters"),
            weight_decay=training.weight_decay,
            stage_names=tuple(stage.name for stage in staged.stages),
            compares=is_preference(body),
        ),
    )
    policy, watched = _resolve_policy(session, project, base, body, chosen)
    spec = JobSpec(
        request=body,
        training=staged.training,
        strategies=chosen.strategies,
        strategies_why=chosen.why,
        policy=policy,
        stages=staged.stages,
        student=staged.student,
        start=start.name,
    )
    return spec, watched, chosen


def _resolve_policy(
    session: Session,
    project: Project,
    base: BaseModel,
    body: CreateJob,
    chosen: ResolvedStrategies,
) -> tuple[Policy | None, tuple[Watched, ...]]:
    """The policy with the versions it watches; None where nothing can drop, has to rise or stops the job."""
    is_off = body.retention is None
    policy = (
        required_policy(project)
        if body.retention is None
        else resolve_policy(body.retention, chosen.strategies, project.default_policy)
    )
    watched = resolve_watched(session, project.id, base, policy.benchmarks, is_off=is_off)
    is_default = body.retention is not None and "policy" not in body.retention.model_fields_set
    policy = pin_metric(policy, watched, is_default=is_default)
    stopping = policy.early_stopping
    stops_by_benchmark = stopping.enabled and stopping.metric != VALID_LOSS
    if not stops_by_benchmark and not any(
        found.is_general or found.expect == "rise" for found in watched
    ):
        return None, watched
    return tighten(policy, watched), watched


def _num_rows(file: File) -> int:
    if file.report is not None:
        return int(file.report["num_rows"])
    return max(file.size_bytes // GUESSED_ROW_BYTES, 1)


def _estimate_power(
    session: Session, start: Start, spec: JobSpec, watched: tuple[Watched, ...]
) -> Power | None:
    """What the sensor can see, from cached baselines where there are any; None where nothing is watched."""
    policy = spec.policy
    if policy is None:
        return None
    key = baseline_key(start.plan(session).quantized(spec.training.quantization))
    history = HistoryRepository(session)
    planned = []
    for found in watched:
        if not found.is_general:
            continue
        version = found.benchmark.version
        row = history.find_baseline(key, version.id)
        planned.append(
            PlannedBenchmark(
                name=found.benchmark.reference,
                scorer=version.scorer,
                weight=found.weight,
                max_drop=found.max_drop,
                n_items=min(policy.gate_items or DEFAULT_GATE_ITEMS, version.num_items // 2),
                baseline=unpack_bytes(row.scores) if row and row.scores else None,
                baseline_tokens=unpack_bytes(row.tokens) if row and row.tokens else None,
                chance=version.chance,
            )
        )
    return power(policy, planned)


def _tell_of_submit(session: Session, job: Job, spec: JobSpec) -> None:
    """The first lines of the job's log: that it is there, what `auto` chose, and every warning."""
    if job.state is JobState.QUEUED:
        add_transition(session, job, JobState.QUEUED, "The job is created and queued.")
    else:
        add_job_event(
            session, job, level="info", message="The job is created; its files are being checked."
        )
    if spec.strategies_why is not None:
        add_job_event(
            session,
            job,
            level="info",
            message=spec.strategies_why,
            data={
                "code": "strategies_chosen",
                "strategies": [strategy.type for strategy in spec.strategies],
            },
        )
    for warning in job.warnings:
        add_job_event(
            session, job, level="warn", message=warning["message"], data={"code": warning["code"]}
        )
