"""What a job will take: memory, disk, tokens, steps and seconds, by plain arithmetic over what is known of it."""

from collections.abc import Sequence
from typing import Final, Literal

from app.domain.estimates_calibration import Calibration
from app.domain.estimates_devices import Device, usable_bytes
from app.domain.estimates_evaluation import EvaluationWork, evaluation_work
from app.domain.estimates_job import Asked, StageRows, find_trained
from app.domain.estimates_memory import (
    WIDE,
    Memory,
    Numbers,
    Trained,
    layer_activation_bytes,
    measure_memory,
)
from app.domain.estimates_pace import Pace
from app.domain.estimates_shapes import ModelShape
from app.domain.estimates_strategies import ExtraCost, extra_cost, strategy_memory
from app.domain.estimates_work import (
    StepRows,
    plan_steps,
    spare_padding,
)
from app.domain.frozen import Frozen
from app.domain.spec import ResolvedStudent
from app.domain.strategies import StrategyConfig

#: Starting a trainer, and a byte of weights or checkpoints through a disk.
START_SECONDS: Final = 10.0
DISK_SECONDS_PER_BYTE: Final = 1 / 5e8


class StrategyEstimate(Frozen):
    """What one strategy costs more, over the whole job."""

    type: str
    memory_bytes: int
    checkpoint_bytes: int
    tokens: int  # read besides those of the training file
    seconds_once: float  # before training: importance, cached teachers, decoded rows
    seconds_per_step: float
    step_share: float  # of a step without strategies


class Estimate(Frozen):
    """A job on one device class."""

    device: str
    type: Literal["cuda", "cpu"]
    calibrated_runs: int  # behind memory and time; 0: data sheets
    memory: Memory
    memory_bytes: int | None  # of the device
    fits: bool | None  # None: the device's memory is not known
    seconds: float
    seconds_per_step: float
    seconds_by_phase: dict[str, float]
    strategies: tuple[StrategyEstimate, ...]
    checkpoint_bytes: int
    num_checkpoints: int
    artifact_bytes: int
    disk_bytes: int
    train_tokens: int
    padded_tokens: int
    eval_tokens: int
    steps: int
    trained_parameters: int


def estimate(asked: Asked, device: Device, calibration: Calibration | None = None) -> Estimate:
    """Reckons a job on a device class, with what was measured there where there is anything."""
    shape, training = asked.shape, asked.training
    lora = training.type == "lora"
    rates = device.rates if calibration is None else calibration.rates
    numbers = Numbers.of(device=device.type, precision=training.precision, lora=lora)
    trained = find_trained(shape, training, asked.strategies)
    costs = [(config, extra_cost(config, lora=lora)) for config in asked.strategies]
    plain = [_step_rows(asked, stage, device) for stage in asked.stages]
    memory = _memory(asked, trained, numbers, plain, costs, device)
    if calibration is not None:
        memory = _calibrated(memory, calibration, is_lora=lora)
    layer = _mean_layer_bytes(shape, trained, numbers, plain, device)
    pace = Pace(shape, trained, layer, rates, asked.num_ranks)
    steps = [stage.training.total_steps for stage in asked.stages]
    without = _mean([pace.step(rows) for rows in plain], steps)
    lines = tuple(
        _strategy(asked, pace, config, cost, plain, without, device) for config, cost in costs
    )
    per_step = without + sum(line.seconds_per_step for line in lines)
    work = evaluation_work(
        asked.evaluation, steps=asked.steps, train_seconds=per_step * asked.steps
    )
    state = WIDE * trained.parameters * (1 + trained.moments)
    checkpoint = state + sum(line.checkpoint_bytes for line in lines)
    num_checkpoints = _num_checkpoints(asked, work)
    artifact = WIDE * (trained.parameters if lora else shape.num_parameters)
    phases = _phases(pace, work, per_step * asked.steps)
    phases["loading"] = START_SECONDS + memory.weights * DISK_SECONDS_PER_BYTE
    phases["strategies"] = sum(line.seconds_once for line in lines)
    phases["checkpoints"] = checkpoint * num_checkpoints * DISK_SECONDS_PER_BYTE
    phases["exporting"] = artifact * DISK_SECONDS_PER_BYTE
    if asked.sides > 1:
        phases["reference"] = _reference(asked, pace)
    if asked.student is not None:
        phases["student"] = _student(pace, asked.student, plain[0])
    fits = (
        None
        if device.memory_bytes is None
        else memory.peak + memory.overhead <= usable_bytes(device.memory_bytes)
    )
    return Estimate(
        device=device.name,
        type=device.type,
        calibrated_runs=0 if calibration is None else calibration.runs,
        memory=memory,
        memory_bytes=device.memory_bytes,
        fits=fits,
        seconds=sum(phases.values()),
        seconds_per_step=per_step,
        seconds_by_phase=phases,
        strategies=lines,
        checkpoint_bytes=checkpoint,
        num_checkpoints=num_checkpoints,
        artifact_bytes=artifact,
        disk_bytes=checkpoint * num_checkpoints + artifact,
        train_tokens=sum(_train_tokens(stage) for stage in asked.stages),
        padded_tokens=round(sum(r.tokens * n for r, n in zip(plain, steps, strict=True))),
        eval_tokens=work.tokens,
        steps=asked.steps,
        trained_parameters=trained.parameters,
    )


def _strategy(
    asked: Asked,
    pace: Pace,
    config: StrategyConfig,
    cost: ExtraCost,
    plain: Sequence[StepRows],
    without: float,
    device: Device,
) -> StrategyEstimate:
    lora = asked.training.type == "lora"
    trained = find_trained(asked.shape, asked.training, asked.strategies).parameters
    steps = [stage.training.total_steps for stage in asked.stages]
    extra, added = [], 0.0
    for rows, count in zip(plain, steps, strict=True):
        seconds = cost.light_share * without + cost.reread_rows * pace.passes(rows)
        if cost.added_rows:
            seconds += pace.passes(rows.times(cost.added_rows / asked.sides), within=rows)
        if cost.taught_rows:
            seconds += pace.forward(rows.times(cost.taught_rows / asked.sides), within=rows)
        extra.append(seconds)
        added += count * rows.real_tokens * cost.added_rows / asked.sides
    source = asked.general if cost.needs_general else asked.stages[0].rows
    available = 0 if source is None else source.num_rows
    mean = 0.0 if source is None else source.mean_tokens
    trained_once = min(cost.trained_once, available) * mean
    read_once = min(cost.read_once, 2 * available) * mean
    once = pace.reading(read_once, mean) + pace.decoding(cost.decoded_once)
    once += 3 * pace.reading(trained_once, mean)
    per_step = _mean(extra, steps)
    kept = cost.trainable_copies if not (lora and cost.keeps_factors) else 0.0
    return StrategyEstimate(
        type=config.type,
        memory_bytes=_kept(asked, cost, trained, device),
        checkpoint_bytes=int(WIDE * kept * trained),
        tokens=round(added + trained_once + read_once + cost.decoded_once),
        seconds_once=once,
        seconds_per_step=per_step,
        step_share=per_step / without if without else 0.0,
    )


def _phases(pace: Pace, work: EvaluationWork, train_seconds: float) -> dict[str, float]:
    def seconds(tokens: int, decoded: int) -> float:
        return pace.reading(tokens, work.mean_tokens, supervised=0.2) + pace.decoding(decoded)

    found = {name: seconds(*tokens) for name, tokens in work.by_phase.items()}
    if work.is_budgeted:
        found["evaluating"] += work.budget_seconds
    return {"training": train_seconds} | found


def _reference(asked: Asked, pace: Pace) -> float:
    """The model that pairs are held to reads each of them once."""
    rows = asked.stages[0].rows
    return pace.reading(rows.tokens + asked.evaluation.validation_tokens, rows.mean_tokens)


def _student(pace: Pace, student: ResolvedStudent, rows: StepRows) -> float:
    """A model of fewer layers learns from the whole one, which reads every row first."""
    read = rows.times(1 + student.general_ratio)
    seconds = student.layers * pace.step(read) + pace.forward(read)
    return seconds * student.training.total_steps


def _kept(asked: Asked, cost: ExtraCost, trained: int, device: Device) -> int:
    """Bytes that a strategy keeps on the device; a teacher's weights are of the type of a frozen base's."""
    teacher = Numbers.of(device=device.type, precision=asked.training.precision, lora=True)
    return strategy_memory(
        cost,
        trained=trained,
        model_bytes=teacher.base_bytes * asked.shape.num_parameters,
        lora=asked.training.type == "lora",
    )


def _memory(
    asked: Asked,
    trained: Trained,
    numbers: Numbers,
    plain: Sequence[StepRows],
    costs: Sequence[tuple[StrategyConfig, ExtraCost]],
    device: Device,
) -> Memory:
    kept = sum(_kept(asked, cost, trained.parameters, device) for _, cost in costs)
    biggest = max((rows.largest_micro for rows in plain), key=lambda micro: micro.tokens)
    return measure_memory(
        asked.shape,
        trained,
        numbers,
        biggest,
        strategy_bytes=kept,
        device=device.type,
        is_split=any(rows.micros > asked.num_ranks for rows in plain),
    )


def _calibrated(memory: Memory, calibration: Calibration, *, is_lora: bool) -> Memory:
    passing = memory.peak - memory.lasting
    peak = calibration.peak_bytes(memory.lasting, passing, is_lora=is_lora)
    factor = calibration.factor(is_lora=is_lora)
    return memory.model_copy(
        update={
            "peak": peak,
            "activations": int(memory.activations * factor),
            "logits": int(memory.logits * factor),
            "overhead": 0,
        }
    )


def _step_rows(asked: Asked, stage: StageRows, device: Device) -> StepRows:
    return plan_steps(
        stage.rows.rows,
        batch_size=stage.training.batch_size * asked.sides,
        max_tokens=stage.training.max_tokens_per_micro_batch,
        spare=spare_padding(asked.shape.num_parameters, device.type),
    )


def _mean_layer_bytes(
    shape: ModelShape,
    trained: Trained,
    numbers: Numbers,
    plain: Sequence[StepRows],
    device: Device,
) -> float:
    width = round(_mean([rows.pairs / rows.tokens for rows in plain], [1] * len(plain)))
    return layer_activation_bytes(shape, trained, numbers, width=width, device=device.type)


def _num_checkpoints(asked: Asked, work: EvaluationWork) -> int:
    """One at each evaluation, the one at step 0, and those that the job asks for besides."""
    interval = asked.training.checkpoint_interval
    return 1 + work.num_evaluations + (asked.steps // interval if interval else 0)


def _train_tokens(stage: StageRows) -> int:
    return stage.rows.tokens * stage.training.n_epochs


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0
