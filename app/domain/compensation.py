"""The job that makes up for a regression after deployment: the version's own, with its regulariser turned up."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import TypeAdapter

from app.domain.decisions import ControllerState
from app.domain.levers import build_levers, turn_up
from app.domain.monitors import MonitoredBenchmark, MonitorSettings
from app.domain.policy import Policy, Retention, WatchedBenchmark
from app.domain.spec import CreateJob, JobSpec
from app.domain.strategies import StrategyConfig, strength_in_force
from app.domain.submit import asked_hyperparameters
from app.domain.wording import number_text

STRATEGY: TypeAdapter[StrategyConfig] = TypeAdapter(StrategyConfig)


class CompensationPlan(NamedTuple):
    """The request of a compensation job, and what is different from the version's own."""

    request: CreateJob
    lever: str | None
    change: str


def plan_compensation(
    spec: JobSpec, strengths: Mapping[str, float], settings: MonitorSettings
) -> CompensationPlan:
    """The version's own job from the same start on the same rows, its regulariser activated or raised.

    The lever is the job's own, turned by the factor of its ladder's rollback; an armed one is activated at its
    default. Strengths count from those in force at the job's end, never below those it asked for. A job without
    strategies gets those that `auto` picks; where every lever is at its cap, the learning rate goes down. What
    the monitor watches is watched, by the tighter of both limits.

    Args:
        spec: Of the job that made the version.
        strengths: In force when it ended; empty where the controller never turned any.
        settings: Of the monitor.
    """
    own = spec.policy or Policy()
    policy = own.model_copy(
        update={
            "benchmarks": _join(own.benchmarks or (), settings.benchmarks),
            "max_drop": min(own.max_drop, settings.limits.max_drop),
            "max_nll_increase": min(own.max_nll_increase, settings.limits.max_nll_increase),
        }
    )
    retention = spec.request.retention or Retention()
    # An alias may point elsewhere by now; the version's own start is meant.
    request = spec.request.model_copy(update={"model": spec.start or spec.request.model})
    if not spec.strategies:
        retention = retention.model_copy(update={"strategies": "auto", "policy": policy})
        plan = request.model_copy(update={"retention": retention})
        return CompensationPlan(
            plan, None, "strategies as `auto` picks them, where there were none"
        )
    lora = spec.training.type == "lora"
    before: dict[str, float] = {
        config.type: max(strength_in_force(config, lora=lora), strengths.get(config.type, 0.0))
        for config in spec.strategies
    }
    levers = build_levers(spec.strategies, own, lora=lora)
    turned = turn_up(levers, ControllerState(strengths=before), own.ladder.rollback_strength_factor)
    after: dict[str, float] = dict(before)
    if turned is not None:
        after[turned[0].strategy] = turned[1]
    strategies = tuple(_with_strength(c, after[c.type], lora=lora) for c in spec.strategies)
    retention = retention.model_copy(update={"strategies": strategies, "policy": policy})
    request = request.model_copy(update={"retention": retention})
    if turned is not None:
        return CompensationPlan(request, turned[0].strategy, turned[2])
    return _slower(request, spec, own.ladder.rollback_learning_rate_factor)


def _with_strength(config: StrategyConfig, strength: float, *, lora: bool) -> StrategyConfig:
    if strength == strength_in_force(config, lora=lora):
        return config
    changed = config.model_dump(mode="json") | {"strength": strength, "armed": False}
    return STRATEGY.validate_python(changed)


def _slower(request: CreateJob, spec: JobSpec, factor: float) -> CompensationPlan:
    """Every lever is at its cap, or there is none: the learning rate goes down."""
    multiplier = asked_hyperparameters(request).learning_rate_multiplier
    by = 1.0 if isinstance(multiplier, str) else multiplier
    rate = spec.training.learning_rate * factor
    training = request.training.model_copy(update={"learning_rate": rate / by})
    words = f"learning rate {number_text(spec.training.learning_rate)} -> {number_text(rate)}"
    return CompensationPlan(request.model_copy(update={"training": training}), None, words)


def _join(
    own: Sequence[WatchedBenchmark], monitored: Sequence[MonitoredBenchmark]
) -> tuple[WatchedBenchmark, ...]:
    """What the job watched and what the monitor does, each once; the job's word on weights stands."""
    names = {found.name for found in own}
    more = [
        WatchedBenchmark(name=found.name, weight=found.weight, max_drop=found.max_drop)
        for found in monitored
        if found.name not in names
    ]
    return (*own, *more)
