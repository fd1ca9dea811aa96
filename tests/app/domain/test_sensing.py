"""Verdicts over benchmarks, the report test and the rule of the searches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app.domain.benchmarks import Scorer
from app.domain.decisions import Verdict
from app.domain.policy import Policy
from app.domain.sensing import SensedBenchmark, Summary, holds, read_report, read_sensor
from app.domain.statistics import PairedGroup, alpha_spent, lower_bound, paired_drop, upper_bound

POLICY = Policy()


def sense(policy, benchmarks, *, look) -> Any:
    """A reading whose numbers are compared without asking each time whether they are there."""
    return read_sensor(policy, benchmarks, look=look)


def scores(n_correct: int, n: int) -> np.ndarray:
    return np.array([1] * n_correct + [0] * (n - n_correct), dtype=np.float32)


def accuracy(name="mc", *, n=2000, before=1200, lost=0, won=0, weight=1.0, max_drop=None, **rest):
    """A benchmark with so many right before, `lost` of them wrong now and `won` of the others right."""
    baseline = scores(before, n)
    current = baseline.copy()
    current[:lost] = 0
    current[n - won :] = 1
    values = {
        "name": name,
        "benchmark_version_id": f"v-{name}",
        "scorer": Scorer.MULTIPLE_CHOICE,
        "weight": weight,
        "max_drop": max_drop,
        "baseline": baseline,
        "current": current,
        "chance": 0.25,
    }
    return SensedBenchmark(**{**values, **rest})


def nll(name="text", *, rise=0.0, n=200, noise=0.02, **rest):
    rng = np.random.default_rng(9)
    tokens = rng.integers(50, 150, n).astype(np.float32)
    baseline = (tokens * 3).astype(np.float32)
    current = (baseline + tokens * (rise + rng.normal(0, noise, n))).astype(np.float32)
    values = {
        "name": name,
        "benchmark_version_id": f"v-{name}",
        "scorer": Scorer.NLL,
        "weight": 1.0,
        "max_drop": None,
        "baseline": baseline,
        "current": current,
        "baseline_tokens": tokens,
    }
    return SensedBenchmark(**{**values, **rest})


def test_identical_models_pass_and_are_never_called_damaged() -> None:
    reading = sense(POLICY, [accuracy(), nll()], look=1)
    for look in (1, 2, 50):
        reading = sense(POLICY, [accuracy(), nll()], look=look)
        assert reading.verdict is Verdict.PASS
        assert not reading.severe
        assert reading.drop == 0
    assert reading.benchmarks[0].mcnemar_p == 1.0


def test_a_five_point_drop_at_2000_items_is_called_at_the_first_look() -> None:
    reading = sense(POLICY, [accuracy(lost=150, won=50)], look=1)
    assert reading.verdict is Verdict.REGRESS
    assert reading.drop == pytest.approx(100 / 1200)
    assert reading.lower > 0.03
    assert reading.alpha == alpha_spent(1)
    assert reading.p_regress < reading.alpha


@pytest.mark.parametrize(("lost", "won"), [(60, 24), (50, 10), (70, 10)])
def test_noise_at_the_threshold_is_inconclusive(lost, won) -> None:
    reading = sense(POLICY, [accuracy(lost=lost, won=won)], look=3)
    assert reading.verdict is Verdict.INCONCLUSIVE
    assert reading.lower < 0.03 < reading.upper


def test_the_readings_numbers_are_those_of_the_statistics() -> None:
    benchmark = accuracy(lost=30, won=10)
    reading = sense(POLICY, [benchmark], look=2)
    estimate = paired_drop([PairedGroup(1.0, benchmark.baseline, benchmark.current)])
    assert reading.stderr == estimate.stderr
    assert reading.lower == lower_bound(estimate, alpha_spent(2))
    assert reading.upper == upper_bound(estimate, 0.05)
    assert reading.benchmarks[0].paired
    assert reading.benchmarks[0].n_items == 2000


def test_severe_needs_a_lower_bound_above_twice_the_limit() -> None:
    mild = sense(POLICY, [accuracy(lost=100, won=20)], look=1)
    harsh = sense(POLICY, [accuracy(lost=150, won=0)], look=1)
    assert (mild.verdict, mild.severe) == (Verdict.REGRESS, False)
    assert (harsh.verdict, harsh.severe) == (Verdict.REGRESS, True)
    assert harsh.lower > 0.06


def test_the_mean_can_hold_while_one_benchmark_falls() -> None:
    fallen, risen = accuracy("a", lost=120, won=10), accuracy("b", lost=10, won=120)
    reading = sense(POLICY, [fallen, risen], look=1)
    assert reading.verdict is Verdict.PASS
    assert [b.verdict for b in reading.benchmarks] == [Verdict.INCONCLUSIVE, Verdict.PASS]
    own = sense(POLICY, [accuracy("a", lost=120, won=10, max_drop=0.03), risen], look=1)
    assert own.verdict is Verdict.REGRESS
    assert own.benchmarks[0].verdict is Verdict.REGRESS
    assert own.benchmarks[0].lower > 0.03


def test_holm_shares_the_alpha_over_mean_nll_and_own_limits() -> None:
    reading = sense(POLICY, [accuracy(max_drop=0.1), nll()], look=1)
    estimate = paired_drop([PairedGroup(1.0, scores(1200, 2000), scores(1200, 2000))])
    assert reading.lower == pytest.approx(lower_bound(estimate, alpha_spent(1) / 3))
    assert reading.benchmarks[0].lower == pytest.approx(lower_bound(estimate, alpha_spent(1) / 3))


def test_a_confirmed_nll_violation_alone_is_a_regression() -> None:
    reading = sense(POLICY, [accuracy(), nll(rise=0.07)], look=1)
    assert reading.verdict is Verdict.REGRESS
    assert not reading.severe
    assert reading.benchmarks[1].drop == pytest.approx(0.07, abs=0.005)
    assert reading.benchmarks[1].limit == 0.05
    assert sense(POLICY, [accuracy(), nll(rise=0.2)], look=1).severe


def test_an_nll_that_does_not_pass_forbids_the_pass() -> None:
    reading = sense(POLICY, [accuracy(), nll(rise=0.045, n=10, noise=0.1)], look=1)
    assert reading.verdict is Verdict.INCONCLUSIVE
    assert reading.benchmarks[0].verdict is Verdict.PASS


def test_nll_stays_out_of_the_mean_and_can_stand_alone() -> None:
    reading = sense(POLICY, [nll()], look=1)
    assert reading.drop is None
    assert reading.verdict is Verdict.PASS


def test_a_benchmark_at_floor_is_left_out_of_the_mean() -> None:
    floor = accuracy("hard", before=510, lost=500)
    reading = sense(POLICY, [accuracy(), floor], look=1)
    assert reading.verdict is Verdict.PASS
    assert reading.drop == 0
    assert reading.benchmarks[1].verdict is Verdict.AT_FLOOR
    assert sense(POLICY, [floor], look=1).verdict is Verdict.AT_FLOOR


@pytest.mark.parametrize(
    "benchmarks",
    [
        [],
        [accuracy(n=1, before=1)],
        [accuracy(current=None)],
        [accuracy(baseline=np.full(10, np.nan), current=np.ones(10))],
        [nll(baseline_tokens=None)],
        [nll(n=1)],
    ],
)
def test_nothing_usable_is_no_data(benchmarks) -> None:
    reading = sense(POLICY, benchmarks, look=1)
    assert reading.verdict is Verdict.NO_DATA
    assert not reading.severe


def test_a_missing_benchmark_forbids_a_pass_but_not_a_regression() -> None:
    missing = accuracy("b", current=None)
    assert sense(POLICY, [accuracy(), missing], look=1).verdict is Verdict.INCONCLUSIVE
    fallen = sense(POLICY, [accuracy(lost=150), missing], look=1)
    assert fallen.verdict is Verdict.REGRESS
    assert fallen.benchmarks[1].verdict is Verdict.NO_DATA


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [accuracy, nll])
def test_a_score_that_is_not_finite_is_a_severe_regression(bad, make) -> None:
    benchmark = make()
    benchmark.current[3] = bad
    reading = sense(POLICY, [benchmark], look=1)
    assert (reading.verdict, reading.severe, reading.not_finite) == (Verdict.REGRESS, True, True)
    assert not holds(POLICY, [benchmark])


def test_items_the_baseline_never_scored_are_dropped() -> None:
    benchmark = accuracy(lost=30)
    benchmark.baseline[:30] = np.nan
    reading = sense(POLICY, [benchmark], look=1)
    assert reading.drop == 0
    assert reading.benchmarks[0].n_items == 1970


def test_a_summary_is_unpaired_and_needs_a_wider_gap() -> None:
    paired = sense(POLICY, [accuracy(lost=90, won=10)], look=1)
    same = accuracy(current=None, summary=Summary(value=1120 / 2000, stderr=None, n=2000))
    unpaired = sense(POLICY, [same], look=1)
    assert paired.verdict is Verdict.REGRESS
    assert unpaired.verdict is Verdict.INCONCLUSIVE
    assert unpaired.drop == pytest.approx(paired.drop)
    assert not unpaired.benchmarks[0].paired
    wrecked = accuracy(current=None, summary=Summary(value=0.3, stderr=0.01, n=2000))
    assert sense(POLICY, [wrecked], look=1).severe


def test_an_nll_summary_needs_its_standard_error() -> None:
    known = nll(current=None, summary=Summary(value=3.3, stderr=0.01, n=200))
    assert sense(POLICY, [known], look=1).verdict is Verdict.REGRESS
    unknown = nll(current=None, summary=Summary(value=3.3, stderr=None, n=200))
    assert sense(POLICY, [unknown], look=1).verdict is Verdict.NO_DATA
    broken = nll(current=None, summary=Summary(value=np.nan, stderr=0.1, n=200))
    assert sense(POLICY, [broken], look=1).not_finite
    assert sense(
        POLICY, [accuracy(current=None, summary=Summary(np.inf, 0.1, 9))], look=1
    ).not_finite


def test_the_report_takes_one_look_at_five_percent_each_side() -> None:
    benchmark = accuracy(lost=62, won=10)
    assert sense(POLICY, [benchmark], look=1).verdict is Verdict.INCONCLUSIVE
    report = read_report(POLICY, [benchmark])
    assert report.verdict is Verdict.REGRESS
    assert (report.look, report.alpha) == (1, 0.05)


def test_holds_asks_for_a_margin_up_to_half_the_limit() -> None:
    assert holds(POLICY, [accuracy(), nll()])
    assert holds(POLICY, [accuracy(lost=17)])  # 1.4 %
    assert not holds(POLICY, [accuracy(lost=32)])  # 2.7 %: under the limit, without a margin
    assert not holds(POLICY, [accuracy(lost=60)])
    assert not holds(POLICY, [accuracy(), nll(rise=0.049)])
    assert not holds(POLICY, [])
    # a gate set too small for a pass can still hold
    small = accuracy(n=100, before=60)
    assert sense(POLICY, [small], look=1).verdict is Verdict.INCONCLUSIVE
    assert holds(POLICY, [small])


def test_what_just_holds_on_the_gate_passes_the_report_test_with_about_80_percent() -> None:
    """True drop unknown: drawn about the gate's estimate; both sets of 20,000 items, drop just at the margin."""
    rng = np.random.default_rng(1)
    n, before, lost, won = 20_000, 12_000, 760, 500
    gate = accuracy(n=n, before=before, lost=lost, won=won)
    assert holds(POLICY, [gate])
    assert not holds(POLICY, [accuracy(n=n, before=before, lost=lost + 20, won=won)])
    stderr = sense(POLICY, [gate], look=1).stderr
    passed, trials = 0, 300
    for _ in range(trials):
        true = (lost - won) / before + rng.normal(0, stderr)
        expected_lost = won + true * before
        report = accuracy(
            n=n, before=before, lost=int(rng.poisson(expected_lost)), won=int(rng.poisson(won))
        )
        passed += read_report(POLICY, [report]).verdict is Verdict.PASS
    assert 0.7 < passed / trials < 0.93


def shares(rng: np.random.Generator, n: int, *, lost: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores like token F1: many zeros and ones, shares between, each item moved a little by another decoding.

    `lost` of the items that scored something score nothing now, so that is the true relative drop.
    """
    kind = rng.integers(0, 3, n)
    baseline = np.where(kind == 0, 0.0, np.where(kind == 1, 1.0, rng.beta(2, 2, n)))
    moved = np.where(rng.random(n) < 0.3, rng.permutation(rng.beta(2, 2, n)) - 0.5, 0.0)
    moved = moved * np.minimum(baseline, 1 - baseline) * 2  # zero on average, and within [0, 1]
    current = (baseline + moved) * (rng.random(n) >= lost)
    return baseline.astype(np.float32), current.astype(np.float32)


def read_shares(rng: np.random.Generator, n: int, lost: float) -> Any:
    baseline, current = shares(rng, n, lost=lost)
    one = accuracy(scorer=Scorer.TOKEN_F1, chance=0.0)
    return read_report(POLICY, [replace(one, baseline=baseline, current=current)])


@pytest.mark.parametrize(
    ("lost", "verdict", "at_least", "at_most"),
    [
        (0.0, Verdict.REGRESS, 0.0, 0.01),
        (0.03, Verdict.REGRESS, 0.0, 0.07),  # at the limit itself: 5 %, and three standard errors
        (0.03, Verdict.PASS, 0.0, 0.07),
        (0.10, Verdict.REGRESS, 0.95, 1.0),
        (0.0, Verdict.PASS, 0.95, 1.0),
    ],
)
def test_shares_are_read_with_the_errors_that_are_promised(
    lost, verdict, at_least, at_most
) -> None:
    rng = np.random.default_rng(7)
    rate = np.mean([read_shares(rng, 1500, lost).verdict is verdict for _ in range(600)])
    assert at_least <= rate <= at_most


def test_unchanged_shares_have_a_width_and_no_mcnemar() -> None:
    baseline, _ = shares(np.random.default_rng(0), 200)
    one = replace(accuracy(scorer=Scorer.TOKEN_F1, chance=0.0), baseline=baseline, current=baseline)
    found = read_report(POLICY, [one]).benchmarks[0]
    assert found.drop == pytest.approx(0.0, abs=1e-7)
    assert found.stderr is not None
    assert found.stderr > 0
    assert found.mcnemar_p is None
    assert read_report(POLICY, [accuracy(lost=3)]).benchmarks[0].mcnemar_p is not None
