"""The closed forms against bootstrap, simulation and hand arithmetic."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from app.domain.statistics import (
    ALPHA_TOTAL,
    DropEstimate,
    PairedGroup,
    alpha_spent,
    holm,
    is_above_chance,
    lower_bound,
    mcnemar_p,
    p_above,
    paired_drop,
    paired_nll_increase,
    relative_drop,
    unpaired_moments,
    unpaired_nll_increase,
    upper_bound,
)


def make_pair(rng, n, accuracy=0.6, lost=0.05, won=0.05):
    """Binary scores with the given accuracy of the baseline and discordance each way (shares of all items)."""
    baseline = (rng.random(n) < accuracy).astype(np.float32)
    flip = rng.random(n)
    value = np.where(baseline == 1, flip >= lost / accuracy, flip < won / (1 - accuracy))
    return baseline, value.astype(np.float32)


def test_identical_scores_give_no_drop_but_a_width() -> None:
    scores = np.array([1, 0, 1, 1, 0] * 40, dtype=np.float32)
    estimate = paired_drop([PairedGroup(1.0, scores, scores)])
    assert estimate.drop == 0
    assert estimate.stderr > 0
    assert lower_bound(estimate, 0.05) < 0 < upper_bound(estimate)


def test_pseudo_items_are_the_only_spread_of_identical_scores() -> None:
    n = 200
    scores = np.array([1, 0] * (n // 2), dtype=np.float32)
    estimate = paired_drop([PairedGroup(1.0, scores, scores)])
    # two residuals of +-1 among n + 2, mean 0: variance 2 / (n + 1), over n, over the baseline squared
    assert estimate.stderr == pytest.approx(math.sqrt(2 / (n + 1) / n) / 0.5, rel=1e-6)


def test_drop_of_two_benchmarks_by_hand() -> None:
    one = PairedGroup(1.0, np.array([1, 1, 1, 0.0]), np.array([1, 1, 0, 0.0]))  # .75 -> .5
    two = PairedGroup(3.0, np.array([1, 0.0]), np.array([1, 0.0]))  # .5 -> .5
    # weighted means: (.75 + 1.5) / 4 and (.5 + 1.5) / 4
    assert paired_drop([one, two]).drop == pytest.approx(0.25 / 2.25)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_closed_form_agrees_with_the_paired_bootstrap(seed) -> None:
    rng = np.random.default_rng(seed)
    pairs = [make_pair(rng, 800, 0.7, 0.08, 0.04), make_pair(rng, 500, 0.5, 0.06, 0.05)]
    weights = np.array([1.0, 2.0]) / 3
    estimate = paired_drop([PairedGroup(w, *p) for w, p in zip(weights, pairs, strict=True)])
    draws = 4000
    before, after = np.zeros(draws), np.zeros(draws)
    for weight, (baseline, value) in zip(weights, pairs, strict=True):
        picked = rng.integers(0, len(baseline), (draws, len(baseline)))
        before += weight * baseline[picked].mean(axis=1)
        after += weight * value[picked].mean(axis=1)
    low, high = np.quantile(1 - after / before, [0.05, 0.95])
    assert lower_bound(estimate, 0.05) == pytest.approx(low, abs=0.0025)
    assert upper_bound(estimate, 0.05) == pytest.approx(high, abs=0.0025)


def test_closed_form_of_nll_agrees_with_the_bootstrap_over_documents() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 400, 300).astype(np.float32)
    baseline = tokens * rng.normal(3.0, 0.4, 300).astype(np.float32)
    value = baseline + tokens * rng.normal(0.05, 0.1, 300).astype(np.float32)
    estimate = paired_nll_increase(baseline, value, tokens)
    picked = rng.integers(0, 300, (4000, 300))
    draws = (value - baseline)[picked].sum(axis=1) / tokens[picked].sum(axis=1)
    low, high = np.quantile(draws, [0.05, 0.95])
    assert lower_bound(estimate, 0.05) == pytest.approx(low, abs=0.0015)
    assert upper_bound(estimate, 0.05) == pytest.approx(high, abs=0.0015)


def test_paired_standard_error_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    baseline, value = make_pair(rng, 4000)
    estimate = paired_drop([PairedGroup(1.0, baseline, value)])
    difference = baseline - value * baseline.mean() / value.mean()
    expected = difference.std(ddof=1) / math.sqrt(4000) * value.mean() / baseline.mean() ** 2
    assert estimate.stderr == pytest.approx(expected, rel=0.01)


def count_intervals(true_drop: float, n: int, trials: int, seed: int) -> tuple[float, float]:
    """Shares of samples whose 95 % upper bound is under the truth, and whose 95 % lower bound is over it."""
    rng = np.random.default_rng(seed)
    accuracy = 0.6
    lost = 0.05 + true_drop * accuracy / 2
    won = 0.05 - true_drop * accuracy / 2
    under = over = 0
    for _ in range(trials):
        baseline, value = make_pair(rng, n, accuracy, lost, won)
        estimate = paired_drop([PairedGroup(1.0, baseline, value)])
        under += upper_bound(estimate) < true_drop
        over += lower_bound(estimate, 0.05) > true_drop
    return under / trials, over / trials


@pytest.mark.parametrize(("true_drop", "n"), [(0.0, 500), (0.03, 500), (0.03, 2000)])
def test_bounds_cover_the_truth_in_95_percent(true_drop, n) -> None:
    under, over = count_intervals(true_drop, n, 1500, 11)
    # 4 standard errors of 5 % at 1,500 trials are 2.3 points
    assert under < 0.073
    assert over < 0.073
    assert under > 0.02
    assert over > 0.02


def simulate_false_regress(looks: int, runs: int, true_drop: float, seed: int) -> float:
    """Share of runs that are ever called regress at a true drop; vectorised over runs, fresh items each look."""
    rng = np.random.default_rng(seed)
    n, accuracy, limit = 1000, 0.6, 0.03
    lost_share = 0.05 + true_drop * accuracy / 2
    won_share = 0.05 - true_drop * accuracy / 2
    called = np.zeros(runs, dtype=bool)
    for look in range(1, looks + 1):
        both, lost, won, _ = rng.multinomial(
            n, [accuracy - lost_share, lost_share, won_share, 1 - accuracy - won_share], runs
        ).T
        before, after = (both + lost) / n, (both + won) / n
        ratio = after / before
        # residuals v - R b of the four cells, and of the two pseudo-items
        counts = np.stack([both, lost + 1, won + 1, n - both - lost - won])
        values = np.stack([1 - ratio, -ratio, np.ones(runs), np.zeros(runs)])
        mean = (counts * values).sum(0) / (n + 2)
        variance = (counts * (values - mean) ** 2).sum(0) / (n + 1) / n / before**2
        quantile = stats.t.ppf(1 - alpha_spent(look), n - 1)
        called |= (1 - ratio) - quantile * np.sqrt(variance) > limit
    return float(called.mean())


def test_endless_looks_call_an_undamaged_model_regressed_in_less_than_one_percent() -> None:
    assert simulate_false_regress(looks=200, runs=4000, true_drop=0.0, seed=3) == 0.0


def test_endless_looks_at_the_limit_itself_err_in_about_one_percent_at_most() -> None:
    share = simulate_false_regress(looks=200, runs=4000, true_drop=0.03, seed=4)
    # 1 % and three of its standard errors at 4,000 runs
    assert 0.001 < share <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 4000)


def test_alpha_schedule_sums_to_one_percent_and_never_runs_out() -> None:
    spent = sum(alpha_spent(k) for k in range(1, 200_000))
    assert spent < ALPHA_TOTAL
    assert spent == pytest.approx(ALPHA_TOTAL, rel=1e-4)
    assert alpha_spent(1) == pytest.approx(0.0060793, rel=1e-4)
    assert alpha_spent(10**6) > 0


def test_holm_by_hand() -> None:
    results = holm([0.012, 0.001, 0.04], 0.03)
    assert [r.rejected for r in results] == [True, True, False]
    assert [r.alpha for r in results] == pytest.approx([0.015, 0.01, 0.03])
    stopped = holm([0.02, 0.011, 0.001], 0.02)
    assert [r.rejected for r in stopped] == [False, False, True]
    assert [r.alpha for r in stopped] == pytest.approx([0.01, 0.01, 0.02 / 3])
    assert holm([], 0.05) == ()


def test_p_values_and_bounds_say_the_same() -> None:
    estimate = DropEstimate(drop=0.05, stderr=0.01, dof=40.0)
    assert p_above(estimate, lower_bound(estimate, 0.01)) == pytest.approx(0.01)
    assert p_above(estimate, upper_bound(estimate, 0.05)) == pytest.approx(0.95)
    assert p_above(estimate, 0.03) == pytest.approx(stats.t.sf(2.0, 40))


def test_mcnemar_is_the_binomial_tail() -> None:
    baseline = np.array([1] * 9 + [0] * 3 + [1] * 20, dtype=np.float32)
    value = np.array([0] * 9 + [1] * 3 + [1] * 20, dtype=np.float32)
    assert mcnemar_p(baseline, value) == pytest.approx(stats.binomtest(3, 12, 0.5).pvalue)
    assert mcnemar_p(baseline, baseline) == 1.0


def test_unpaired_result_is_wider_than_the_paired_one() -> None:
    baseline, value = make_pair(np.random.default_rng(2), 1000)
    paired = paired_drop([PairedGroup(1.0, baseline, value)])
    unpaired = relative_drop([unpaired_moments(1.0, baseline, float(value.mean()), None, 1000)])
    assert unpaired.drop == pytest.approx(paired.drop, rel=1e-4)
    assert unpaired.stderr > 1.8 * paired.stderr


def test_unpaired_nll_adds_both_variances() -> None:
    tokens = np.full(50, 10.0)
    baseline = np.linspace(20, 40, 50)
    estimate = unpaired_nll_increase(baseline, tokens, 3.2, 0.03, 60)
    own = unpaired_nll_increase(baseline, tokens, 3.2, 0.0, 60)
    assert estimate.drop == pytest.approx(0.2)
    assert estimate.stderr == pytest.approx(math.hypot(0.03, own.stderr))
    assert estimate.dof == 49


def test_no_nll_interval_has_width_zero() -> None:
    tokens, nats = np.full(4, 10.0), np.full(4, 30.0)
    assert paired_nll_increase(nats, nats, tokens).stderr > 0


@pytest.mark.parametrize(
    ("correct", "n", "chance", "above"),
    [
        (300, 1000, 0.25, True),
        (255, 1000, 0.25, False),
        (0, 1000, 0.0, False),
        (20, 1000, 0.0, True),
        (1, 1, 0.0, False),
    ],
)
def test_at_floor_test(correct, n, chance, above) -> None:
    scores = np.array([1] * correct + [0] * (n - correct), dtype=np.float32)
    assert is_above_chance(scores, chance) is above


def test_a_baseline_of_zero_has_no_relative_drop() -> None:
    zeros: Any = np.zeros(10)
    with pytest.raises(ValueError, match="above zero"):
        paired_drop([PairedGroup(1.0, zeros, zeros)])
    with pytest.raises(ValueError, match="above zero"):
        relative_drop([])
