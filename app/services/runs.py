"""What an attempt is given: its plan, the inputs to bring to the worker's disk, and where it takes up the run."""

import os
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import UUID

from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, File, Job
from app.db.repositories.checkpoints import CheckpointRepository
from app.db.repositories.history import HistoryRepository
from app.domain.decisions import Action, ControllerState
from app.domain.identifiers import parse_id, public_id
from app.domain.messages import Carry, DecisionReply
from app.domain.runplan import (
    BasePlan,
    BenchmarkPlan,
    EvaluationPlan,
    ExportPlan,
    ResumePoint,
    RowsPlan,
    RunPlan,
    StagePlan,
)
from app.domain.spec import ExportSpec, JobSpec
from app.domain.states import JobKind
from app.errors import TrainingFailed
from app.services.checkpoints import choose_resume
from app.services.decisions import RUN, in_force
from app.services.engine import hold
from app.services.evaluations import find_baseline
from app.services.named_models import list_stored_models
from app.services.progress import list_new_orders
from app.services.scratch import Input, SavedState, Scratch, start_input
from app.services.watched import Watched, plan_benchmark, resolve_pinned
from app.settings import Settings

#: Below so many parameters one thread is fastest: two that share a cache were up to 9 times slower.
SMALL_MODEL_PARAMETERS: Final = 5_000_000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what has to lie where it says before the trainer starts."""

    plan: RunPlan | ExportPlan | EvaluationPlan
    inputs: tuple[Input, ...]
    state: SavedState | None  # what is resumed from, or exported
    order_version: int  # of the last outside order that the plan knows
    starts: tuple[SavedState, ...] = ()  # other jobs' checkpoints that the start is made of


def prepare_run(session: Session, job_id: UUID, attempt: int, settings: Settings) -> Prepared:
    """Plans an attempt and keeps the plan with the job.

    Raises:
        Fenced: The attempt no longer holds the job.
        TrainingFailed: It cannot be run: a file is gone, or no checkpoint is left.
    """
    job = hold(session, job_id, attempt)
    scratch = Scratch(settings.scratch_root, job_id, attempt)
    match job.kind:
        case JobKind.FINE_TUNING:
            return build_run_plan(session, job, settings, scratch)
        case JobKind.EXPORT:
            return build_export_plan(session, job, settings, scratch)
        case JobKind.EVALUATION:
            raise TrainingFailed("An evaluation is planned elsewhere.", code="unsupported_kind")
        case JobKind.EXTERNAL:
            raise TrainingFailed("An external run is trained elsewhere.", code="unsupported_kind")


def build_run_plan(session: Session, job: Job, settings: Settings, scratch: Scratch) -> Prepared:
    """A fine-tuning attempt; what an earlier attempt settled (interval, items, threads, ranks) stays."""
    spec = JobSpec.model_validate(job.spec)
    if spec.no_rows_kept:
        scratch = replace(scratch, keeps_rows=False)
    earlier = job.run_plan or {}
    base, base_files, starts = start_input(session, job, scratch)
    base = base.quantized(spec.training.quantization)
    inputs = [*base_files]
    rows = {
        name: _rows(session, file_id, name, scratch, inputs)
        for name, file_id in (
            ("training_file", job.training_file_id),
            ("validation_file", job.validation_file_id),
            ("general_data", job.general_file_id),
        )
    }
    training_rows = rows["training_file"]
    if training_rows is None:
        raise TrainingFailed("The job has no training file.", "training_file", "file_not_found")
    policy = spec.policy
    asked = None if policy is None else policy.gate_items
    resources, retention = spec.request.resources, spec.request.retention
    checkpoint = choose_resume(session, job)
    plan = RunPlan(
        job_id=public_id("job", job.id),
        attempt=job.attempt,
        branch=job.branch,
        base=base,
        training_rows=training_rows,
        validation_rows=rows["validation_file"],
        general_rows=rows["general_data"],
        training=spec.training,
        strategies=spec.strategies,
        stages=_stages(session, spec, scratch, inputs),
        student=spec.student,
        merge_back=None if retention is None else retention.merge_back,
        shift_report=retention is not None and retention.shift_report,
        models=_models(session, job, spec, scratch, inputs),
        policy=policy,
        benchmarks=_benchmarks(session, job, spec, base, scratch, inputs),
        eval_interval=earlier.get("eval_interval"),
        gate_items=earlier.get("gate_items", asked),
        num_processes=earlier.get("num_processes")
        or resources.num_processes
        or max(job.num_gpus, 1),
        threads=earlier.get("threads") or choose_threads(session, job, settings),
        scratch_directory=str(scratch.directory),
        cache_directory=str(scratch.cache),
        resume=None if checkpoint is None else _resume(session, job, checkpoint, scratch),
    )
    job.run_plan = without_baselines(plan.model_dump(mode="json"))
    session.flush()
    return Prepared(plan, tuple(inputs), _state(checkpoint, scratch), job.order_version, starts)


def build_export_plan(session: Session, job: Job, settings: Settings, scratch: Scratch) -> Prepared:
    """An export attempt: one point of another job's line from base to tuned."""
    spec = ExportSpec.model_validate(job.spec)
    source = session.get_one(Job, parse_id("job", spec.source_job_id))
    checkpoint = session.get_one(Checkpoint, parse_id("checkpoint", spec.checkpoint_id))
    if checkpoint.deleted_at is not None or checkpoint.corrupt:
        raise TrainingFailed("The checkpoint to export is gone.", code="no_valid_checkpoint")
    base, base_files, starts = start_input(session, job, scratch)
    inputs = [*base_files]
    source_spec = JobSpec.model_validate(source.spec)
    base = base.quantized(source_spec.training.quantization)
    plan = ExportPlan(
        job_id=public_id("export", job.id),
        attempt=job.attempt,
        base=base,
        checkpoint_directory=str(scratch.checkpoint(checkpoint)),
        training=source_spec.training,
        strategies=source_spec.strategies,
        stage_names=tuple(stage.name for stage in source_spec.stages),
        alpha=spec.alpha,
        benchmarks=_benchmarks(session, source, source_spec, base, scratch, inputs),
        threads=choose_threads(session, job, settings),
        scratch_directory=str(scratch.directory),
        cache_directory=str(scratch.cache),
    )
    job.run_plan = without_baselines(plan.model_dump(mode="json"))
    session.flush()
    return Prepared(plan, tuple(inputs), _state(checkpoint, scratch), job.order_version, starts)


def choose_threads(session: Session, job: Job, settings: Settings) -> int:
    """CPU threads of a trainer: the operator's word, else one for a small model and every core for others."""
    if settings.torch_threads is not None:
        return settings.torch_threads
    base = session.get_one(BaseModel, job.base_model_id)
    if int(base.details.get("num_parameters") or 0) < SMALL_MODEL_PARAMETERS:
        return 1
    return max((os.cpu_count() or 1) // (settings.worker_slots or 1), 1)


def find_state(session: Session, path: str, scratch: Scratch) -> SavedState | None:
    """The stored checkpoint at a path, as rollbacks and publish targets name it."""
    return _state(CheckpointRepository(session).find_path(scratch.job_id, path), scratch)


def _rows(
    session: Session, file_id: UUID | None, param: str, scratch: Scratch, inputs: list[Input]
) -> RowsPlan | None:
    if file_id is None:
        return None
    local = _file(session, file_id, param, scratch, inputs)
    return RowsPlan(path=str(local.local), sha256=local.sha256)


def _models(
    session: Session, job: Job, spec: JobSpec, scratch: Scratch, inputs: list[Input]
) -> dict[str, str]:
    """Local directories of the other models that strategies name."""
    directories = {}
    for model in list_stored_models(session, job.project_id, spec.strategies):
        local = scratch.input(model.sha256)
        if all(known.local != local for known in inputs):
            inputs.append(Input(model.path, local, model.sha256, is_directory=True))
        directories[model.name] = str(local)
    return directories


def _stages(
    session: Session, spec: JobSpec, scratch: Scratch, inputs: list[Input]
) -> tuple[StagePlan, ...]:
    plans = []
    for place, stage in enumerate(spec.stages):
        param = f"stages.{place}.training_file"
        file_id = parse_id("file", stage.training_file, param=param)
        local = _file(session, file_id, param, scratch, inputs)
        plans.append(
            StagePlan(
                name=stage.name,
                training_rows=RowsPlan(path=str(local.local), sha256=local.sha256),
                training=stage.training,
                trains=stage.trains,
                strengths=stage.strengths,
            )
        )
    return tuple(plans)


def _file(
    session: Session, file_id: UUID, param: str, scratch: Scratch, inputs: list[Input]
) -> Input:
    row = session.get_one(File, file_id)
    if row.deleted_at is not None:
        raise TrainingFailed(
            f"The file {public_id('file', file_id)} was deleted.", param, "file_not_found"
        )
    found = Input(row.path, scratch.file(row.sha256), row.sha256, is_directory=False)
    inputs.append(found)
    return found


def _benchmarks(
    session: Session,
    job: Job,
    spec: JobSpec,
    base: BasePlan,
    scratch: Scratch,
    inputs: list[Input],
) -> tuple[BenchmarkPlan, ...]:
    """What the job watches, with the baselines that are known; its spec names exact versions."""
    if spec.policy is None:
        return ()
    watched = resolve_pinned(session, job.project_id, spec.policy.benchmarks or ())
    return tuple(benchmark_input(session, found, base, scratch, inputs) for found in watched)


def benchmark_input(
    session: Session, found: Watched, base: BasePlan, scratch: Scratch, inputs: list[Input]
) -> BenchmarkPlan:
    """A benchmark with the baseline that is known; its file joins the inputs."""
    version = found.benchmark.version
    file = _file(session, version.file_id, "retention.policy.benchmarks", scratch, inputs)
    return plan_benchmark(
        found.benchmark,
        weight=found.weight,
        max_drop=found.max_drop,
        path=str(file.local),
        baseline=find_baseline(session, base, version.id),
    )


def _resume(session: Session, job: Job, checkpoint: Checkpoint, scratch: Scratch) -> ResumePoint:
    """Where the attempt begins: a checkpoint with its recorded decision, or a rollback's target with what ran on."""
    history = HistoryRepository(session)
    decision, carry, state = None, None, None
    if checkpoint.branch == job.branch:
        row = history.find_decision(job.id, checkpoint.branch, checkpoint.step, RUN)
        if row is not None and in_force(row).action is not Action.ROLL_BACK:
            decision = DecisionReply.model_validate(row.reply)
    else:
        row = history.find_rollback(job)
        if row is not None and row.carry is not None:
            carry = Carry.model_validate(row.carry)
        if job.controller_state is not None:
            state = ControllerState.model_validate(
                job.controller_state if row is None else row.decision["state"]
            )
    orders = [
        order
        for order in list_new_orders(session, job.id, job.branch, after=0)
        if order.effective_step is None or order.effective_step > checkpoint.step
    ]
    return ResumePoint(
        checkpoint_directory=str(scratch.checkpoint(checkpoint)),
        branch=job.branch,
        step=checkpoint.step,
        decision=decision,
        carry=carry,
        state=state,
        orders=tuple(orders),
    )


def _state(checkpoint: Checkpoint | None, scratch: Scratch) -> SavedState | None:
    if checkpoint is None:
        return None
    return SavedState(
        checkpoint_id=checkpoint.id,
        path=checkpoint.path,
        local=scratch.checkpoint(checkpoint),
        manifest_sha256=checkpoint.manifest_sha256,
    )


def without_baselines(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan as it is kept: baselines lie with the evaluations, and can be megabytes."""
    empty = {"baseline_scores": None, "baseline_tokens": None}
    return plan | {"benchmarks": [benchmark | empty for benchmark in plan["benchmarks"]]}
