"""The request of a compensation job: the version's own, its regulariser activated or raised."""

import pytest

from app.domain.compensation import CompensationPlan, plan_compensation
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.monitors import MonitoredBenchmark, MonitorLimits, MonitorSettings, OnRegression
from app.domain.policy import Ladder, Policy, Retention, WatchedBenchmark
from app.domain.spec import CreateJob, JobSpec
from app.domain.strategies import StrategyConfig
from tests.factories import make_training

DEFAULT = Retention()
SETTINGS = MonitorSettings(
    benchmarks=(MonitoredBenchmark(name="mc@1"), MonitoredBenchmark(name="em@2", weight=2.0)),
    limits=MonitorLimits(max_drop=0.02, max_nll_increase=0.2),
    schedule=None,
    on_regression=OnRegression(),
)


def make_spec(*strategies, policy: Policy | None = None, retention=DEFAULT, **training):
    return JobSpec(
        request=CreateJob(model="tiny", training_file="file-1", retention=retention),
        training=make_training(**training),
        strategies=strategies,
        strategies_why=None,
        policy=policy,
    )


def strategies_of(plan: CompensationPlan) -> tuple[StrategyConfig, ...]:
    retention = plan.request.retention
    assert retention is not None
    assert not isinstance(retention.strategies, str)
    return retention.strategies


def strengths(plan: CompensationPlan) -> dict[str, float | None]:
    return {config.type: config.strength for config in strategies_of(plan)}


def test_a_strength_is_raised_by_the_ladders_factor() -> None:
    plan = plan_compensation(make_spec(EwcConfig(strength=3.0)), {}, SETTINGS)
    assert strengths(plan) == {"ewc": 12.0}
    assert (plan.lever, plan.change) == ("ewc", "ewc strength 3 -> 12")
    assert plan.request.model == "tiny"
    assert plan.request.training_file == "file-1"
    own = Policy(ladder=Ladder(rollback_strength_factor=10))
    plan = plan_compensation(make_spec(EwcConfig(strength=3.0), policy=own), {}, SETTINGS)
    assert strengths(plan) == {"ewc": 30.0}


def test_it_counts_from_what_the_controller_had_come_to() -> None:
    spec = make_spec(EwcConfig(strength=3.0), ReplayConfig(strength=0.1))
    plan = plan_compensation(spec, {"ewc": 24.0, "replay": 0.2}, SETTINGS)
    assert strengths(plan) == {"ewc": 96.0, "replay": 0.2}
    lowered = plan_compensation(spec, {"ewc": 0.5}, SETTINGS)
    assert strengths(lowered)["ewc"] == 12.0


def test_an_armed_strategy_is_activated_at_its_default() -> None:
    plan = plan_compensation(make_spec(EwcConfig(armed=True)), {"ewc": 0.0}, SETTINGS)
    (config,) = strategies_of(plan)
    assert (config.strength, config.armed) == (100.0, False)
    assert "activated" in plan.change


@pytest.mark.parametrize("retention", [None, Retention()])
def test_a_job_without_strategies_gets_those_of_auto(retention) -> None:
    plan = plan_compensation(make_spec(retention=retention), {}, SETTINGS)
    assert plan.request.retention is not None
    assert plan.request.retention.strategies == "auto"
    assert plan.lever is None


def test_with_every_lever_at_its_cap_the_learning_rate_goes_down() -> None:
    capped = ReplayConfig(strength=0.5)
    plan = plan_compensation(make_spec(capped, learning_rate=4e-3), {}, SETTINGS)
    assert strengths(plan) == {"replay": 0.5}
    assert plan.request.training.learning_rate == pytest.approx(2e-3)
    assert plan.change == "learning rate 0.004 -> 0.002"


def test_the_next_lever_is_taken_when_the_first_is_at_its_cap() -> None:
    own = Policy(ladder=Ladder(strength_cap_factor=1))
    spec = make_spec(L2SpConfig(strength=1.0), ReplayConfig(strength=0.1), policy=own)
    plan = plan_compensation(spec, {}, SETTINGS)
    assert strengths(plan) == {"l2sp": 1.0, "replay": pytest.approx(0.4)}


def test_what_the_monitor_watches_is_watched_by_the_tighter_limit() -> None:
    own = Policy(
        benchmarks=(WatchedBenchmark(name="mc@1", weight=5.0),), max_drop=0.05, max_nll_increase=0.1
    )
    plan = plan_compensation(make_spec(EwcConfig(strength=1.0), policy=own), {}, SETTINGS)
    assert plan.request.retention is not None
    policy = plan.request.retention.policy
    assert [(b.name, b.weight) for b in policy.benchmarks or ()] == [("mc@1", 5.0), ("em@2", 2.0)]
    assert (policy.max_drop, policy.max_nll_increase) == (0.02, 0.1)
