"""Stages resolved: the numbers of each, the preset written out, and how strengths cross from one to the next."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from app.domain.decisions import Action, ControllerState, Decision, Look, StageFact
from app.domain.spec import CreateJob, ResolvedStage, ResolvedStudent, ResolvedTraining
from app.domain.stages import Stage, StudentStage, TrainStage
from app.domain.strategies import StrategyConfig, strength_in_force
from app.errors import BadRequest

#: An adapter's learning rate beside that of all weights: the ratio of the two defaults.
ADAPTER_RATE: Final = 10.0
ROADMAP: Final = ("regularised", "adapter", "student")


class Stages(NamedTuple):
    """What a job's stages resolve to; without stages there are none and the training is as it was."""

    training: ResolvedTraining
    stages: tuple[ResolvedStage, ...]
    student: ResolvedStudent | None


def resolve_stages(
    request: CreateJob,
    training: ResolvedTraining,
    strategies: Sequence[StrategyConfig],
    num_rows: Mapping[str, int],
) -> Stages:
    """Every number of every stage.

    Args:
        request: The job request.
        training: Resolved for the job's own training file.
        strategies: Of the job.
        num_rows: Rows by the public id of each training file.

    Raises:
        BadRequest: A stage cannot be what it says; `param` names it.
    """
    asked = _asked_stages(request, training)
    if not asked:
        return Stages(training, (), None)
    _check(asked, training, {config.type for config in strategies})
    stages = tuple(
        _resolve(stage, request, training, num_rows)
        for stage in asked
        if isinstance(stage, TrainStage)
    )
    late = training.type == "full" and any(stage.trains == "adapter" for stage in stages)
    total = sum(stage.training.total_steps for stage in stages)
    whole = training.model_copy(
        update={
            "total_steps": total,
            "n_epochs": sum(stage.training.n_epochs for stage in stages),
            "late_adapter": late,
        }
    )
    last = asked[-1]
    student = (
        _resolve_student(last, training, num_rows[request.training_file])
        if isinstance(last, StudentStage)
        else None
    )
    return Stages(whole, stages, student)


def stage_files(request: CreateJob) -> tuple[tuple[str, str], ...]:
    """The training files that stages name themselves: (field, public id)."""
    return tuple(
        (f"stages.{place}.training_file", stage.training_file)
        for place, stage in enumerate(request.stages)
        if isinstance(stage, TrainStage) and stage.training_file is not None
    )


def stage_strategies(
    strategies: Sequence[StrategyConfig], strengths: Mapping[str, float]
) -> tuple[StrategyConfig, ...]:
    """The strategies as a stage has them."""
    return tuple(
        config.model_copy(update={"strength": strengths[config.type], "armed": False})
        if config.type in strengths
        else config
        for config in strategies
    )


def stage_facts(
    stages: Sequence[ResolvedStage], strategies: Sequence[StrategyConfig], *, lora: bool
) -> tuple[StageFact, ...]:
    """The stages as the controller sees them."""
    facts: list[StageFact] = []
    for stage in stages:
        first = facts[-1].last_step if facts else 0
        facts.append(
            StageFact(
                name=stage.name,
                first_step=first,
                last_step=first + stage.training.total_steps,
                strengths={
                    config.type: strength_in_force(config, lora=lora)
                    for config in stage_strategies(strategies, stage.strengths)
                },
            )
        )
    return tuple(facts)


def trained_stage(stages: Sequence[StageFact], step: int) -> int:
    """The stage that trained the step which made `step` accepted ones; the first one for step 0."""
    return next((i for i, stage in enumerate(stages) if step <= stage.last_step), len(stages) - 1)


def next_stage(stages: Sequence[StageFact], step: int) -> int:
    """The stage that trains the step after `step` accepted ones; the last one after all."""
    return next((i for i, stage in enumerate(stages) if step < stage.last_step), len(stages) - 1)


def cross_stages(decision: Decision, look: Look) -> Decision:
    """The decision with the coefficients of the stage that is trained from here on.

    A strength that was raised stays raised by the same factor, an armed strategy that was activated stays
    so, and validation losses are counted anew.
    """
    if not look.stages or decision.action is Action.STOP:
        return decision
    here = trained_stage(look.stages, look.step)
    step = look.step
    if decision.action is Action.ROLL_BACK:
        step = int(decision.details["target_step"])
    there = next_stage(look.stages, step)
    if here == there:
        return decision
    state = _carry(decision.state, look.stages[here].strengths, look.stages[there].strengths)
    return decision.model_copy(update={"state": state})


def _carry(
    state: ControllerState, before: Mapping[str, float], after: Mapping[str, float]
) -> ControllerState:
    strengths = {
        kind: after[kind] * (strength / before[kind])
        if before[kind] > 0
        else max(strength, after[kind])
        for kind, strength in state.strengths.items()
    }
    return state.model_copy(
        update={
            "strengths": strengths,
            "best_valid_loss": None,
            "best_scores": (),
            "evals_without_improvement": 0,
            "stop_proposed": False,
        }
    )


def _asked_stages(request: CreateJob, training: ResolvedTraining) -> tuple[Stage, ...]:
    """The stages as asked for, or those of the preset."""
    if request.preset is None:
        return request.stages
    if request.stages:
        raise BadRequest("preset: it writes the stages; leave stages out.", "preset")
    if training.type != "full":
        raise BadRequest(
            "preset: 'roadmap' trains all weights before it trains an adapter; set training.type to 'full'.",
            "preset",
        )
    tuned = max(round(training.n_epochs * 2 / 3), 1)
    regularised, adapter, student = ROADMAP
    return (
        TrainStage(name=regularised, n_epochs=tuned, trains="backbone"),
        TrainStage(name=adapter, n_epochs=max(training.n_epochs - tuned, 1), trains="adapter"),
        StudentStage(name=student),
    )


def _check(stages: Sequence[Stage], training: ResolvedTraining, kinds: set[str]) -> None:
    names: set[str] = set()
    for place, stage in enumerate(stages):
        path = f"stages.{place}"
        if stage.name in names:
            raise BadRequest(f"{path}.name: '{stage.name}' occurs twice.", f"{path}.name")
        names.add(stage.name)
        if isinstance(stage, StudentStage):
            if place != len(stages) - 1 or place == 0:
                raise BadRequest(
                    f"{path}: a student is distilled from what the stages before it made; put it last,"
                    " behind a stage of training.",
                    path,
                )
            if training.type != "full":
                raise BadRequest(
                    f"{path}: a student is a whole model; set training.type to 'full'.", path
                )
            continue
        unknown = sorted(stage.strengths.keys() - kinds)
        if unknown:
            raise BadRequest(
                f"{path}.strengths: '{unknown[0]}' is not a strategy of this job.",
                f"{path}.strengths",
            )
        if stage.trains == "backbone" and training.type != "full":
            raise BadRequest(
                f"{path}.trains: the backbone is frozen in a job of type 'lora'; set training.type to"
                " 'full'.",
                f"{path}.trains",
            )


def _resolve(
    stage: TrainStage, request: CreateJob, training: ResolvedTraining, num_rows: Mapping[str, int]
) -> ResolvedStage:
    file = stage.training_file or request.training_file
    n_epochs = stage.n_epochs or training.n_epochs
    rate = stage.learning_rate
    if rate is None:
        is_late = training.type == "full" and stage.trains == "adapter"
        rate = training.learning_rate * (ADAPTER_RATE if is_late else 1.0)
    return ResolvedStage(
        name=stage.name,
        training_file=file,
        training=training.model_copy(
            update={
                "n_epochs": n_epochs,
                "total_steps": n_epochs * math.ceil(num_rows[file] / training.batch_size),
                "learning_rate": rate,
                "lr_scheduler": stage.lr_scheduler or training.lr_scheduler,
                "warmup_ratio": training.warmup_ratio
                if stage.warmup_ratio is None
                else stage.warmup_ratio,
            }
        ),
        trains=stage.trains,
        strengths=stage.strengths,
    )


def _resolve_student(
    stage: StudentStage, training: ResolvedTraining, num_rows: int
) -> ResolvedStudent:
    n_epochs = stage.n_epochs or training.n_epochs
    return ResolvedStudent(
        name=stage.name,
        layers=stage.layers,
        training=training.model_copy(
            update={
                "n_epochs": n_epochs,
                "total_steps": n_epochs * math.ceil(num_rows / training.batch_size),
                "learning_rate": stage.learning_rate or training.learning_rate,
            }
        ),
        kd_coef=stage.kd_coef,
        ce_coef=stage.ce_coef,
        temperature=stage.temperature,
        general_ratio=stage.general_ratio,
    )
