"""What a job would take, as clients read it."""

from typing import Any, Literal

from app.api.schemas.base import Schema
from app.domain.estimates import Estimate
from app.services.estimates import EstimatedJob


class ShownMemory(Schema):
    """Bytes of one GPU; `peak` counts what is held at once, `overhead` what a device class takes besides."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    strategies: int
    overhead: int
    peak: int


class ShownStrategyCost(Schema):
    """What a strategy costs more, over the whole job."""

    type: str
    memory_bytes: int
    checkpoint_bytes: int
    tokens: int
    seconds_once: float
    seconds_per_step: float
    step_share: float


class ShownDevice(Schema):
    """The job on one device class; `fits` is null where its memory is not known."""

    name: str
    type: Literal["cuda", "cpu"]
    memory_bytes: int | None
    peak_bytes: int
    fits: bool | None
    seconds: float
    seconds_per_step: float
    calibrated_runs: int


class EstimateObject(Schema):
    """What a job would take; the first of `devices` is the one that memory and seconds are of."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    num_parameters: int
    trained_parameters: int
    gpu_memory_bytes: int
    gpu_memory: ShownMemory
    disk_bytes: int
    checkpoint_bytes: int
    num_checkpoints: int
    artifact_bytes: int
    train_tokens: int
    padded_tokens: int
    eval_tokens: int
    steps: int
    seconds: float
    seconds_per_step: float
    seconds_by_phase: dict[str, float]
    strategies: list[ShownStrategyCost]
    devices: list[ShownDevice]
    fits: dict[str, bool]
    allowed_to_proceed: bool
    rows_read: Literal["all", "sample"]
    warnings: list[dict[str, Any]]


def show_estimate(found: EstimatedJob) -> EstimateObject:
    """An estimate as clients see it."""
    main = found.main
    fits = {each.device: each.fits for each in found.estimates if each.fits is not None}
    return EstimateObject(
        model=found.spec.request.model,
        num_parameters=found.shape.num_parameters,
        trained_parameters=main.trained_parameters,
        gpu_memory_bytes=main.memory.peak,
        gpu_memory=ShownMemory(**main.memory.model_dump()),
        disk_bytes=main.disk_bytes,
        checkpoint_bytes=main.checkpoint_bytes,
        num_checkpoints=main.num_checkpoints,
        artifact_bytes=main.artifact_bytes,
        train_tokens=main.train_tokens,
        padded_tokens=main.padded_tokens,
        eval_tokens=main.eval_tokens,
        steps=main.steps,
        seconds=main.seconds,
        seconds_per_step=main.seconds_per_step,
        seconds_by_phase=main.seconds_by_phase,
        strategies=[ShownStrategyCost(**line.model_dump()) for line in main.strategies],
        devices=[_show_device(each) for each in found.estimates],
        fits=fits,
        allowed_to_proceed=found.may_proceed,
        rows_read="all" if found.is_whole else "sample",
        warnings=found.warnings,
    )


def _show_device(each: Estimate) -> ShownDevice:
    return ShownDevice(
        name=each.device,
        type=each.type,
        memory_bytes=each.memory_bytes,
        peak_bytes=each.memory.peak,
        fits=each.fits,
        seconds=each.seconds,
        seconds_per_step=each.seconds_per_step,
        calibrated_runs=each.calibrated_runs,
    )
