"""Power against simulation, and the evaluation budget's choice."""

from typing import Any

import numpy as np
import pytest

from app.domain.benchmarks import Scorer
from app.domain.policy import Policy
from app.domain.power import PlannedBenchmark, plan_evaluations, power
from app.domain.statistics import (
    PairedGroup,
    alpha_spent,
    lower_bound,
    paired_drop,
    upper_bound,
)

POLICY = Policy()


def see(policy, benchmarks, *, look=1) -> Any:
    """Power whose numbers are compared without asking each time whether they are there."""
    return power(policy, benchmarks, look=look)


def planned(name="mc", n_items=1000, **rest):
    values = {"scorer": Scorer.MULTIPLE_CHOICE, "weight": 1.0, "max_drop": None}
    return PlannedBenchmark(name, n_items=n_items, **{**values, **rest})


def simulate(n, accuracy, drop, seed, trials=1500, look=1):
    """Shares of samples that pass and that are called regress at this look, 10 % discordance."""
    rng = np.random.default_rng(seed)
    lost, won = 0.05 + drop * accuracy / 2, 0.05 - drop * accuracy / 2
    passes = regressions = 0
    for _ in range(trials):
        both, gone, new, _ = rng.multinomial(n, [accuracy - lost, lost, won, 1 - accuracy - won])
        baseline = np.zeros(n)
        baseline[: both + gone] = 1
        value = np.zeros(n)
        value[:both] = 1
        value[both + gone : both + gone + new] = 1
        estimate = paired_drop([PairedGroup(1.0, baseline, value)])
        passes += upper_bound(estimate) <= 0.03
        regressions += lower_bound(estimate, alpha_spent(look)) > 0.03
    return passes / trials, regressions / trials


@pytest.mark.parametrize("n", [1000, 3000])
def test_predicted_power_is_what_a_simulation_finds(n) -> None:
    mean = see(POLICY, [planned(n_items=n)]).mean
    passes, _ = simulate(n, 0.5, 0.0, 1)
    assert mean.pass_at_zero == pytest.approx(passes, abs=0.04)
    _, regressions = simulate(n, 0.5, mean.regress_at_80, 2)
    assert regressions == pytest.approx(0.8, abs=0.05)


def test_items_for_pass_80_is_the_smallest_that_does() -> None:
    needed = see(POLICY, [planned()]).mean.items_for_pass_80
    assert see(POLICY, [planned(n_items=needed)]).mean.pass_at_zero >= 0.8
    assert see(POLICY, [planned(n_items=needed - 1)]).mean.pass_at_zero < 0.8
    # (1.645 + 0.84)^2 * 0.1 / (0.03 * 0.5)^2, as good as
    assert needed == pytest.approx(2748, rel=0.01)


@pytest.mark.parametrize("look", [1, 20, 2000])
def test_items_for_regress_90_call_two_points_above_the_limit_at_that_look(look) -> None:
    strong = np.repeat([1.0, 0.0], [900, 100])
    needed = see(POLICY, [planned(baseline=strong)], look=look).mean.items_for_regress_90
    _, regressions = simulate(needed, 0.9, 0.05, look, look=look)
    assert regressions == pytest.approx(0.9, abs=0.025)  # 3.2 standard errors of 1,500 trials


def test_items_for_regress_90_are_the_fewest_and_more_at_a_later_look() -> None:
    first, later = see(POLICY, [planned()]).mean, see(POLICY, [planned()], look=20).mean
    # (2.507 + 1.282)^2 * 0.1 / (0.02 * 0.5)^2 and, with the pseudo-items and the t quantile, a few more; the
    # variance of a ratio is smaller by the drop itself
    assert first.items_for_regress_90 == pytest.approx(14_360, rel=0.06)
    # alpha 1.5e-5: a quantile of 4.17
    assert later.items_for_regress_90 / first.items_for_regress_90 == pytest.approx(
        ((4.17 + 1.282) / (2.507 + 1.282)) ** 2, rel=0.02
    )
    assert first.items_for_pass_80 == later.items_for_pass_80  # a pass spends nothing


def test_what_is_recommended_is_enough_for_both_promises() -> None:
    result = see(POLICY, [planned(n_items=5)])
    wanted = result.recommended
    assert wanted.binds == "regress"
    assert wanted.look == 10  # so many evaluations a job is given
    tenth = see(POLICY, [planned()], look=10).mean.items_for_regress_90
    assert wanted.items == wanted.items_for_regress == tenth > result.mean.items_for_regress_90
    assert wanted.items_for_pass == result.mean.items_for_pass_80 < wanted.items
    later = see(POLICY, [planned()], look=11)
    assert later.recommended.items == later.mean.items_for_regress_90 > tenth
    # a tight limit is hard to stay under for sure, and two points above it are as easy to see as before
    tight = see(Policy(max_drop=0.005), [planned()]).recommended
    assert tight.binds == "pass"
    assert tight.items == tight.items_for_pass > tight.items_for_regress


def test_what_is_recommended_lets_the_mean_and_every_text_pass_together() -> None:
    texts = [planned(f"text-{i}", scorer=Scorer.NLL) for i in range(4)]
    alone, together = see(POLICY, texts[:1]), see(POLICY, texts)
    assert together.mean is None
    assert together.recommended.items_for_pass > alone.recommended.items_for_pass
    needed = together.recommended.items_for_pass
    enough = see(POLICY, [planned(f"text-{i}", needed, scorer=Scorer.NLL) for i in range(4)])
    assert np.prod([e.pass_at_zero for e in enough.benchmarks.values()]) >= 0.8
    beside = see(POLICY, [planned(), *texts], look=10)
    assert beside.recommended.items_for_regress == beside.mean.items_for_regress_90


def test_what_is_out_of_reach_is_not_recommended() -> None:
    assert see(POLICY, [planned(n_items=0)]).recommended is None
    assert see(POLICY, []).recommended is None
    hopeless = see(Policy(max_drop=1e-6), [planned()]).recommended
    assert (hopeless.items, hopeless.binds, hopeless.items_for_pass) == (None, "pass", None)
    assert hopeless.items_for_regress is not None


def test_a_better_base_needs_fewer_items() -> None:
    strong = np.concatenate([np.ones(1900), np.zeros(100)]).astype(np.float32)
    estimate = see(POLICY, [planned(baseline=strong, chance=0.25)])
    assert estimate.from_baseline
    assert estimate.mean.items_for_pass_80 < 800
    assert estimate.mean.pass_at_zero > 0.8
    perfect = see(POLICY, [planned(baseline=np.ones(2000, dtype=np.float32))]).mean
    assert perfect.pass_at_zero > 0.999


def test_a_benchmark_at_floor_or_without_items_has_no_power() -> None:
    guessing = np.array([1, 0, 0, 0] * 200, dtype=np.float32)
    result = see(POLICY, [planned("a", baseline=guessing, chance=0.25), planned("b", n_items=0)])
    assert result.mean is None
    assert result.benchmarks["a"].at_floor
    assert result.benchmarks["a"].pass_at_zero is None
    assert result.benchmarks["b"].items_for_pass_80 is None


def test_more_hypotheses_cost_power() -> None:
    alone = see(POLICY, [planned()]).mean
    shared = see(POLICY, [planned(), planned("text", scorer=Scorer.NLL)])
    assert shared.mean.regress_at_80 > alone.regress_at_80
    text = shared.benchmarks["text"]
    assert text.limit == 0.05
    assert 0.05 < text.regress_at_80 < 0.1
    assert text.pass_at_zero > 0.9
    tokens = np.full(20, 80.0)
    few = planned("few", 20, scorer=Scorer.NLL, baseline=tokens * 3, baseline_tokens=tokens)
    assert see(POLICY, [few]).benchmarks["few"].pass_at_zero < 0.8


def test_own_limits_are_used_and_hopeless_ones_say_so() -> None:
    tight = see(POLICY, [planned(max_drop=1e-6)]).benchmarks["mc"]
    assert tight.limit == 1e-6
    assert tight.items_for_pass_80 is None
    assert see(POLICY, [planned(n_items=3)]).benchmarks["mc"].regress_at_80 is None


def plan(
    policy=POLICY,
    *,
    seconds_per_item=1e-4,
    available=5000,
    total_steps=1000,
    needed=1500,
    epoch=500,
):
    return plan_evaluations(
        1.0,
        {"a": seconds_per_item, "b": seconds_per_item},
        total_steps,
        policy,
        {"a": available, "b": available},
        epoch,
        needed,
    )


def spent(chosen, seconds_per_item, total_steps=1000):
    return (total_steps // chosen.eval_interval) * 2 * chosen.gate_items * seconds_per_item


def test_a_cheap_evaluation_gets_what_is_wished() -> None:
    chosen = plan()
    assert (chosen.eval_interval, chosen.gate_items) == (100, 1500)
    assert plan(needed=200).gate_items == 1000
    assert plan(available=300).gate_items == 300


def test_items_shrink_to_what_a_pass_needs_before_the_interval_grows() -> None:
    # 100 s for 10 evaluations of 2 benchmarks: 700 items at 0.7 / 98 s
    chosen = plan(seconds_per_item=0.007, needed=500)
    assert (chosen.eval_interval, chosen.gate_items) == (100, 714)


def test_with_fewer_items_than_a_pass_needs_the_interval_grows_first() -> None:
    chosen = plan(seconds_per_item=0.01, needed=1500)
    assert chosen.gate_items == 1500
    assert chosen.eval_interval == 334
    assert spent(chosen, 0.01) <= 100


def test_only_when_one_evaluation_is_too_dear_do_the_items_shrink_below() -> None:
    chosen = plan(seconds_per_item=0.1, needed=1500)
    assert (chosen.eval_interval, chosen.gate_items) == (1000, 500)
    assert plan(seconds_per_item=10.0).gate_items == 50


def test_what_the_job_fixed_is_kept() -> None:
    both = plan(Policy(eval_interval=70, gate_items=20), seconds_per_item=10.0)
    assert (both.eval_interval, both.gate_items) == (70, 20)
    interval = plan(Policy(eval_interval="epoch"), seconds_per_item=0.05, needed=1500)
    assert (interval.eval_interval, interval.gate_items) == (500, 500)
    items = plan(Policy(gate_items=1000), seconds_per_item=0.01)
    assert items.gate_items == 1000
    assert items.eval_interval == 200
    assert plan(Policy(eval_interval=5000)).eval_interval == 1000


@pytest.mark.parametrize("seconds_per_item", [1e-5, 1e-3, 0.01, 0.03, 0.3])
@pytest.mark.parametrize("total_steps", [7, 120, 1000])
def test_the_budget_is_kept_unless_the_floor_forbids(seconds_per_item, total_steps) -> None:
    chosen = plan(seconds_per_item=seconds_per_item, total_steps=total_steps, epoch=40)
    assert 1 <= chosen.eval_interval <= total_steps
    if chosen.gate_items > 50:
        assert spent(chosen, seconds_per_item, total_steps) <= 0.1 * total_steps


def test_without_a_baseline_the_default_assumptions_choose() -> None:
    chosen = plan_evaluations(1.0, {"a": 1e-5}, 100, POLICY, {"a": 50_000}, 100)
    assert chosen.gate_items == pytest.approx(2748, rel=0.01)
