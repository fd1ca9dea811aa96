"""What a job would take, before it is submitted; and what finished runs teach of the devices they ran on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.db.models import BaseModel, File, Job
from app.db.repositories.history import HistoryRepository
from app.db.repositories.measured import MeasuredJob, MeasuredRepository
from app.db.repositories.project_jobs import ProjectJobRepository
from app.db.session import SessionFactory, transaction
from app.domain.benchmarks import GENERATION, BenchmarkKind
from app.domain.estimates import Estimate, estimate
from app.domain.estimates_calibration import MOST_RUNS, Calibration, Measured, Run, calibrate
from app.domain.estimates_devices import DEFAULT_GPU, KNOWN_GPUS, Device, cpu, known_gpu
from app.domain.estimates_evaluation import BenchmarkRows, EvaluationRows
from app.domain.estimates_job import Asked, RowSample, StageRows
from app.domain.estimates_runs import reckon_run
from app.domain.estimates_shapes import ModelShape
from app.domain.methods import is_preference
from app.domain.spec import CreateJob, JobSpec
from app.errors import BadRequest
from app.services.estimate_rows import (
    FileBytes,
    guess_bytes_per_token,
    measure_rows,
    sample_tokens,
)
from app.services.evaluations import baseline_key
from app.services.storage import Storage
from app.services.submission import GUESSED_ROW_BYTES, ResolvedJob, resolve_job
from app.services.submit_warnings import Warnings, warn_of_spec, warning
from app.services.watched import Watched

NOT_CALIBRATED: Final = "not_calibrated"
NOTHING_FITS: Final = "does_not_fit"
DATA_PARALLEL: Final = "whole_model_on_each_gpu"


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """A device class that runs were measured on."""

    device: Device
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Found:
    """All that an estimate rests on, read in one transaction."""

    spec: JobSpec
    shape: ModelShape
    files: dict[str, File]  # by public id of training files, and `general`, `validation`
    benchmarks: tuple[BenchmarkRows, ...]
    devices: tuple[MeasuredDevice, ...]  # the one measured last first
    known_row: tuple[Measured, int, int] | None  # of the base: a run, its file's bytes and rows
    warnings: Warnings


@dataclass(frozen=True, slots=True)
class EstimatedJob:
    """A job on every device class that is known; the first one is what the server has, as far as it knows."""

    spec: JobSpec
    shape: ModelShape
    estimates: tuple[Estimate, ...]
    is_whole: bool  # every row was read; else the first of each file stand for the others
    warnings: Warnings = field(default_factory=list)

    @property
    def main(self) -> Estimate:
        """On the device class measured last, else on the default one."""
        return self.estimates[0]

    @property
    def may_proceed(self) -> bool:
        """Whether it fits what runs were measured on, or else some GPU of the table."""
        measured = [each for each in self.estimates if each.calibrated_runs]
        return any(each.fits is not False for each in measured or self.estimates)


def estimate_job(
    factory: SessionFactory, storage: Storage, project_id: UUID, body: CreateJob
) -> EstimatedJob:
    """Reckons what a job would take; nothing is written, and no transaction is open while files are read.

    Args:
        factory: Of one short transaction.
        storage: Where the rows lie.
        project_id: Whose job it would be.
        body: As a job is submitted.

    Raises:
        NotFound: As of `submit_job`.
        BadRequest: As of `submit_job`; or nothing is known of the base model's shape.
    """
    with transaction(factory) as session:
        found = _find(session, project_id, body)
        session.expunge_all()
    return _reckon(found, storage)


def keep_measured(session: Session, job: Job, measured: Measured | None) -> None:
    """Keeps what a finished run measured, for the estimates of later jobs."""
    if measured is not None:
        MeasuredRepository(session).add(
            job.id, job.base_model_id, measured.device_class, measured.model_dump(mode="json")
        )


def list_calibrations(session: Session) -> tuple[MeasuredDevice, ...]:
    """Device classes with what their finished runs taught, the one measured last first."""
    repository = MeasuredRepository(session)
    found = []
    for name in repository.list_classes():
        jobs = repository.list_latest(name, MOST_RUNS)
        runs = [run for job in jobs if (run := _as_run(job)) is not None]
        if runs:
            last = Measured.model_validate(jobs[0].measured)
            device = measured_device(last)
            found.append(MeasuredDevice(device, calibrate(name, runs, device.rates)))
    return tuple(found)


def measured_device(measured: Measured) -> Device:
    """A device class as a run saw it, with the rates that are said of it before any run."""
    if measured.device_type == "cpu":
        named = cpu(measured.device_class, measured.threads)
    else:
        likely = [gpu for gpu in KNOWN_GPUS if _is_same(gpu.name, measured.device)]
        named = likely[-1] if likely else known_gpu(DEFAULT_GPU)
    return named.model_copy(
        update={"name": measured.device_class, "memory_bytes": measured.memory_bytes}
    )


def _find(session: Session, project_id: UUID, body: CreateJob) -> Found:
    project = ProjectJobRepository(session).get_project(project_id)
    resolved = resolve_job(session, project, body)
    base = resolved.start.base
    shape = _shape_of(base)
    files = {body.training_file: resolved.files.training, **resolved.files.stages}
    if resolved.files.general is not None:
        files["general"] = resolved.files.general
    if resolved.files.validation is not None:
        files["validation"] = resolved.files.validation
    row = MeasuredRepository(session).find_file_bytes(base.id, compares=is_preference(body))
    return Found(
        spec=resolved.spec,
        shape=shape,
        files=files,
        benchmarks=_benchmarks(session, resolved),
        devices=list_calibrations(session),
        known_row=None if row is None else (Measured.model_validate(row[0]), row[1], row[2]),
        warnings=warn_of_spec(resolved.spec, resolved.watched, resolved.chosen),
    )


def _shape_of(base: BaseModel) -> ModelShape:
    try:
        return ModelShape.model_validate(base.details.get("shape"))
    except ValidationError:
        raise BadRequest(
            f"model: nothing is known of the layers of '{base.name}', so nothing can be estimated. An operator"
            " can register it again under another name: its config and the headers of its weights are read"
            " then.",
            "model",
            "model_shape_unknown",
        ) from None


def _benchmarks(session: Session, resolved: ResolvedJob) -> tuple[BenchmarkRows, ...]:
    start = resolved.start.plan(session).quantized(resolved.spec.training.quantization)
    key, history = baseline_key(start), HistoryRepository(session)
    per_token = guess_bytes_per_token(resolved.start.base.details.get("vocab_size"))

    def describe(found: Watched) -> BenchmarkRows:
        version = found.benchmark.version
        file = session.get_one(File, version.file_id)
        return BenchmarkRows(
            name=found.benchmark.reference,
            num_items=version.num_items,
            item_tokens=file.size_bytes / max(version.num_items, 1) / per_token,
            generates=version.scorer in GENERATION,
            has_baseline=history.find_baseline(key, version.id) is not None,
        )

    kinds = {BenchmarkKind.GENERAL, BenchmarkKind.DOMAIN}
    return tuple(
        describe(found) for found in resolved.watched if found.benchmark.version.kind in kinds
    )


def _reckon(found: Found, storage: Storage) -> EstimatedJob:
    spec = found.spec
    read = {name: measure_rows(storage, file) for name, file in found.files.items()}
    per_token = _bytes_per_token(found, read)
    samples = {name: _sample(found, name, measured, per_token) for name, measured in read.items()}
    first = spec.request.training_file
    stages = tuple(
        StageRows(training=stage.training, rows=samples[stage.training_file])
        for stage in spec.stages
    ) or (StageRows(training=spec.training, rows=samples[first]),)
    asked = Asked(
        shape=found.shape,
        training=spec.training,
        strategies=spec.strategies,
        stages=stages,
        general=samples.get("general"),
        evaluation=_evaluation(found, samples),
        num_ranks=spec.request.resources.num_processes or max(spec.request.resources.num_gpus, 1),
        student=spec.student,
    )
    measured = [(each.device, each.calibration) for each in found.devices]
    default = [gpu for gpu in KNOWN_GPUS if gpu.name == DEFAULT_GPU]
    others = [gpu for gpu in KNOWN_GPUS if gpu.name != DEFAULT_GPU]
    devices = [*measured, *((gpu, None) for gpu in (*default, *others))]
    estimates = tuple(estimate(asked, device, calibration) for device, calibration in devices)
    return EstimatedJob(
        spec=spec,
        shape=found.shape,
        estimates=estimates,
        is_whole=all(each.share_read >= 1.0 for each in read.values()),
        warnings=found.warnings + _warn(asked, estimates),
    )


def _sample(found: Found, name: str, measured: FileBytes, per_token: float) -> RowSample:
    return sample_tokens(
        measured,
        num_rows=_num_rows(found.files[name]),
        bytes_per_token=per_token,
        max_tokens=found.spec.training.max_seq_length,
    )


def _bytes_per_token(found: Found, read: dict[str, FileBytes]) -> float:
    """So that a file like the one a run on this base read comes out at the tokens that the run counted."""
    guess = guess_bytes_per_token(found.shape.vocab_size)
    if found.known_row is None:
        return guess
    measured, size_bytes, num_rows = found.known_row
    name = found.spec.request.training_file
    file, rows = found.files[name], read[name]
    longest = found.spec.training.max_seq_length
    here = _num_rows(file)
    wanted = measured.mean_row_tokens * (file.size_bytes / here) / (size_bytes / num_rows)
    for _ in range(3):  # turns' own tokens and the cut at the longest length are not scaled
        sample = sample_tokens(rows, num_rows=here, bytes_per_token=guess, max_tokens=longest)
        guess = min(max(guess * sample.mean_tokens / wanted, 0.25), 20.0)
    return guess


def _evaluation(found: Found, samples: dict[str, RowSample]) -> EvaluationRows:
    policy, spec = found.spec.policy, found.spec
    validation = samples.get("validation")
    interval: Any = "budget"
    asked = "epoch" if policy is None else policy.eval_interval
    if isinstance(asked, int):
        interval = asked
    elif asked == "epoch" or not found.benchmarks:
        interval = max(spec.training.total_steps // max(spec.training.n_epochs, 1), 1)
    return EvaluationRows(
        benchmarks=() if policy is None else found.benchmarks,
        validation_tokens=0 if validation is None else validation.tokens,
        eval_interval=interval,
        eval_budget=0.1 if policy is None else policy.eval_budget,
        gate_items=None if policy is None else policy.gate_items,
    )


def _num_rows(file: File) -> int:
    if file.report is not None and file.report.get("num_rows"):
        return int(file.report["num_rows"])
    return max(file.size_bytes // GUESSED_ROW_BYTES, 1)


def _as_run(job: MeasuredJob) -> Run | None:
    """What was measured beside what is reckoned; None of a base without a shape, or of several ranks."""
    try:
        shape = ModelShape.model_validate(job.details.get("shape"))
        measured, spec = Measured.model_validate(job.measured), JobSpec.model_validate(job.spec)
    except ValidationError:
        return None
    if measured.world_size != 1 or spec.stages:
        return None
    return reckon_run(shape, spec.training, spec.strategies, measured)


def _warn(asked: Asked, estimates: Sequence[Estimate]) -> Warnings:
    main, warnings = estimates[0], []
    if main.calibrated_runs == 0:
        warnings.append(
            warning(
                NOT_CALIBRATED,
                "No run was measured here yet: memory and time are reckoned from data sheets for"
                f" {main.device}, and may be far off. Finished jobs calibrate them.",
                "resources",
            )
        )
    if asked.num_ranks > 1:
        warnings.append(
            warning(
                DATA_PARALLEL,
                f"{asked.num_ranks} processes share the rows of a step; each holds the whole model, so more"
                " GPUs do not lower the memory of one.",
                "resources.num_gpus",
            )
        )
    if all(each.fits is False for each in estimates):
        warnings.append(
            warning(
                NOTHING_FITS,
                "The job fits no GPU that is known here. Train an adapter (training.type 'lora'), lower"
                " training.max_tokens_per_micro_batch, or set training.gradient_checkpointing.",
                "training",
            )
        )
    return warnings


def _is_same(known: str, measured: str) -> bool:
    """Whether a driver's name (`NVIDIA A100-SXM4-80GB`) is that of a GPU of the table."""
    words = known.replace("-", " ").split()
    return all(word in measured for word in words[1:])
