"""What a job request leaves open, resolved: the numbers of `auto`, the strategies, the policy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from app.domain.auto import Job, choose_strategies
from app.domain.configs.distillation import DistillationConfig, find_distillation_problem
from app.domain.configs.hybrid import check_hybrid_optimizer
from app.domain.configs.memory import MemoryConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.levers import check_lever
from app.domain.policy import Policy, Retention
from app.domain.spec import CreateJob, DpoHyperparameters, Hyperparameters, ResolvedTraining
from app.domain.strategies import StrategyConfig, needs_general_data
from app.errors import BadRequest

LORA_LEARNING_RATE: Final = 2e-4
FULL_LEARNING_RATE: Final = 2e-5
#: Of direct preference optimisation: its learning rates beside those, and the beta of Rafailov et al. 2023.
DPO_RATE: Final = 0.1
DPO_BETA: Final = 0.1
DEFAULT_CONTEXT: Final = 2048

# `auto` epochs: three, but more where the file is small and fewer where it is large, so that the model sees
# between these many rows in all.
WISHED_EPOCHS: Final = 3
FEWEST_ROWS_SEEN: Final = 300
MOST_ROWS_SEEN: Final = 75_000
MOST_EPOCHS: Final = 25

# `auto` batch size: the power of two that gives about this many steps an epoch, within bounds.
WISHED_STEPS_PER_EPOCH: Final = 32
SMALLEST_BATCH: Final = 4
LARGEST_BATCH: Final = 32

#: The largest model, in parameters, on which the strategies' default strengths were measured.
MEASURED_PARAMETERS: Final = 200_000


class ResolvedStrategies(NamedTuple):
    """The strategies of a job, what `auto` says of its choice, and whether the defaults were never measured there."""

    strategies: tuple[StrategyConfig, ...]
    why: str | None
    is_extrapolated: bool


def resolve_training(
    request: CreateJob, *, num_rows: int, context_length: int | None, seed: int
) -> ResolvedTraining:
    """Every number of a run.

    `auto`: learning rate 2e-4 for LoRA and 2e-5 for full, a tenth of it for `dpo`, times
    `learning_rate_multiplier` (`auto` is 1); beta of `dpo` 0.1;
    epochs and batch size by `auto_epochs` and `auto_batch_size`; `total_steps` is epochs times the batches of
    an epoch, the last one possibly smaller.

    Args:
        request: The job request.
        num_rows: Of the training file.
        context_length: Of the base model in tokens; None when it is not known.
        seed: Used where the request has none.

    Raises:
        BadRequest: `training.max_seq_length` is above the model's context, the weights would decay twice, or
            something is asked that a quantised base can't do.
    """
    asked = asked_hyperparameters(request)
    training = request.training
    _check_quantization(request)
    if request.retention is not None and not isinstance(request.retention.strategies, str):
        check_hybrid_optimizer(
            request.retention.strategies,
            lora=training.type == "lora",
            weight_decay=training.weight_decay,
        )
    batch_size = (
        auto_batch_size(num_rows) if isinstance(asked.batch_size, str) else asked.batch_size
    )
    n_epochs = auto_epochs(num_rows) if isinstance(asked.n_epochs, str) else asked.n_epochs
    multiplier = (
        1.0 if isinstance(asked.learning_rate_multiplier, str) else asked.learning_rate_multiplier
    )
    beta = _resolve_beta(asked)
    learning_rate = training.learning_rate
    if learning_rate is None:
        learning_rate = LORA_LEARNING_RATE if training.type == "lora" else FULL_LEARNING_RATE
        learning_rate *= 1.0 if beta is None else DPO_RATE
    return ResolvedTraining(
        type=training.type,
        lora=training.lora,
        quantization=training.quantization,
        n_epochs=n_epochs,
        batch_size=batch_size,
        total_steps=n_epochs * math.ceil(num_rows / batch_size),
        learning_rate=learning_rate * multiplier,
        max_seq_length=_sequence_length(training.max_seq_length, context_length),
        warmup_ratio=training.warmup_ratio,
        lr_scheduler=training.lr_scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_tokens_per_micro_batch=training.max_tokens_per_micro_batch,
        gradient_checkpointing=training.gradient_checkpointing,
        checkpoint_interval=training.checkpoint_interval,
        precision=request.resources.precision,
        seed=seed if request.seed is None else request.seed,
        beta=beta,
    )


def _check_quantization(request: CreateJob) -> None:
    """Refuses what a base in few bits can't do."""
    training, retention = request.training, request.retention
    if training.quantization == "none":
        return
    if training.type == "full":
        raise BadRequest(
            f"training.quantization: '{training.quantization}' keeps the base's weights in a form that can't"
            " learn, so it needs training.type 'lora', whose adapters do.",
            "training.quantization",
            "quantization_unsupported",
        )
    if retention is None or isinstance(retention.strategies, str):
        return
    for place, config in enumerate(retention.strategies):
        if isinstance(config, MemoryConfig) and config.encoder is None:
            param = f"retention.strategies.{place}.encoder"
            raise BadRequest(
                f"{param}: rows would be read by the quantised base here and by the whole one where they are"
                " looked up, so the memory needs an encoder of its own.",
                param,
                "quantization_unsupported",
            )


def asked_hyperparameters(request: CreateJob) -> Hyperparameters:
    """As the request gives them: `method` goes before the deprecated field."""
    if request.method is not None:
        return request.method.hyperparameters
    return request.hyperparameters or Hyperparameters()


def auto_epochs(num_rows: int) -> int:
    """Three epochs, more for a small file and fewer for a large one."""
    if num_rows * WISHED_EPOCHS < FEWEST_ROWS_SEEN:
        return min(math.ceil(FEWEST_ROWS_SEEN / num_rows), MOST_EPOCHS)
    return max(1, min(WISHED_EPOCHS, MOST_ROWS_SEEN // num_rows))


def auto_batch_size(num_rows: int) -> int:
    """The power of two within bounds that gives about 32 steps an epoch; never more than the rows there are."""
    wished = 1 << int(math.log2(max(num_rows / WISHED_STEPS_PER_EPOCH, 1)))
    return min(max(wished, SMALLEST_BATCH), LARGEST_BATCH, num_rows)


def resolve_strategies(
    retention: Retention | None,
    *,
    lora: bool,
    has_general_data: bool,
    num_parameters: int | None,
    memory_gb: float | None = None,
    is_roadmap: bool = False,
) -> ResolvedStrategies:
    """The strategies of a job: those it names, checked, or those that `auto` picks.

    Raises:
        BadRequest: A type occurs twice, or a strategy needs general data and there is none.
    """
    if retention is None:
        return ResolvedStrategies((), None, is_extrapolated=False)
    if not isinstance(retention.strategies, str):
        _check_strategies(retention.strategies, has_general_data=has_general_data)
        return ResolvedStrategies(retention.strategies, None, is_extrapolated=False)
    chosen = choose_strategies(
        Job(
            lora=lora,
            has_general_data=has_general_data,
            no_rows_kept=retention.privacy == "no_rows_kept",
            num_parameters=num_parameters,
            memory_gb=memory_gb,
            is_roadmap=is_roadmap,
        )
    )
    is_extrapolated = num_parameters is None or num_parameters > MEASURED_PARAMETERS
    return ResolvedStrategies(chosen.strategies, chosen.why, is_extrapolated)


def resolve_policy(
    retention: Retention, strategies: Sequence[StrategyConfig], default: Mapping[str, Any] | None
) -> Policy:
    """The job's own policy, else the project's default; its lever must be one of the strategies.

    Raises:
        BadRequest: The lever is none.
    """
    policy = retention.policy
    if default is not None and "policy" not in retention.model_fields_set:
        policy = Policy.model_validate(default)
        if policy.lever is not None and policy.lever not in {s.type for s in strategies}:
            policy = policy.model_copy(update={"lever": None})  # the project's wish, not the job's
    check_lever(strategies, policy)
    return policy


def _check_strategies(strategies: Sequence[StrategyConfig], *, has_general_data: bool) -> None:
    seen: set[str] = set()
    for place, strategy in enumerate(strategies):
        path = f"retention.strategies.{place}"
        if strategy.type in seen:
            raise BadRequest(
                f"{path}.type: '{strategy.type}' occurs twice; give one entry a type.",
                f"{path}.type",
                "duplicate_strategy",
            )
        seen.add(strategy.type)
        if needs_general_data(strategy) and not has_general_data:
            raise BadRequest(
                f"{path}: '{strategy.type}' needs general data; name a file of training rows in"
                " retention.general_data, as the base model has none.",
                path,
                "general_data_required",
            )
    _check_distillation(strategies)


def _check_distillation(strategies: Sequence[StrategyConfig]) -> None:
    replay = next((s for s in strategies if isinstance(s, ReplayConfig)), None)
    for place, strategy in enumerate(strategies):
        if isinstance(strategy, DistillationConfig):
            problem = find_distillation_problem(strategy, replay)
            if problem is not None:
                path = f"retention.strategies.{place}.on"
                raise BadRequest(f"{path}: {problem}.", path)


def _resolve_beta(asked: Hyperparameters) -> float | None:
    if not isinstance(asked, DpoHyperparameters):
        return None
    return DPO_BETA if isinstance(asked.beta, str) else asked.beta


def _sequence_length(asked: int | None, context_length: int | None) -> int:
    if asked is None:
        return DEFAULT_CONTEXT if context_length is None else min(context_length, DEFAULT_CONTEXT)
    if context_length is not None and asked > context_length:
        raise BadRequest(
            f"training.max_seq_length: {asked} is above the model's context of {context_length} tokens.",
            "training.max_seq_length",
        )
    return asked
