"""Benchmarks that must rise: the gain, its bound, and what a version that gained nothing is worth."""

import numpy as np
import pytest

from app.domain.benchmarks import Scorer
from app.domain.decisions import GainReading, Reading, Verdict
from app.domain.gains import read_gains
from app.domain.policy import Policy
from app.domain.publishing import judge_publication
from app.domain.sensing import SensedBenchmark


def policy(min_gain: float | None = None, **more: object) -> Policy:
    wish = {"name": "skill", "expect": "rise", "min_gain": min_gain}
    return Policy.model_validate({"benchmarks": [wish, {"name": "kept"}]} | more)


def sensed(baseline, current, scorer=Scorer.TOKEN_F1, tokens=None, name="skill") -> SensedBenchmark:
    return SensedBenchmark(
        name=name,
        benchmark_version_id="v",
        scorer=scorer,
        weight=1.0,
        max_drop=None,
        baseline=baseline,
        current=current,
        baseline_tokens=tokens,
    )


RNG = np.random.default_rng(0)
BEFORE = RNG.uniform(0, 0.5, 800).astype(np.float32)


@pytest.mark.parametrize(
    ("rise", "min_gain", "has_risen"),
    [
        (0.1, None, True),
        (0.1, 0.05, True),
        (0.1, 0.1, False),
        (0.0, None, False),
        (-0.1, None, False),
    ],
)
def test_a_gain_is_shown_when_its_lower_bound_is_above_what_was_asked(
    rise, min_gain, has_risen
) -> None:
    current = BEFORE + np.float32(rise) + RNG.normal(0, 0.05, 800).astype(np.float32)
    (found,) = read_gains(
        policy(min_gain), [sensed(BEFORE, current), sensed(BEFORE, BEFORE, name="kept")]
    )
    assert found.gain == pytest.approx(rise, abs=0.01)
    assert found.lower is not None
    assert found.gain is not None
    assert found.lower < found.gain
    assert found.has_risen is has_risen


def test_a_baseline_of_zero_can_rise_too() -> None:
    zero, one = np.zeros(60, np.float32), np.ones(60, np.float32)
    (found,) = read_gains(policy(0.5), [sensed(zero, one)])
    assert (found.gain, found.has_risen) == (1.0, True)


def test_of_nll_a_fall_is_a_gain() -> None:
    tokens = np.full(100, 20, np.float32)
    before = RNG.normal(60, 5, 100).astype(np.float32)
    (found,) = read_gains(policy(0.4), [sensed(before, before - 10, Scorer.NLL, tokens)])
    assert found.gain == pytest.approx(0.5, abs=1e-4)
    assert found.has_risen
    (worse,) = read_gains(policy(), [sensed(before, before + 1, Scorer.NLL, tokens)])
    assert not worse.has_risen


@pytest.mark.parametrize(
    "current", [None, np.full(800, np.inf, np.float32), np.full(800, np.nan, np.float32)]
)
def test_what_was_not_measured_has_not_risen(current) -> None:
    (found,) = read_gains(policy(), [sensed(BEFORE, current)])
    assert (found.gain, found.has_risen) == (None, False)
    assert read_gains(Policy(), [sensed(BEFORE, BEFORE)]) == ()


def test_an_undamaged_model_is_said_to_have_risen_in_at_most_five_percent() -> None:
    rng = np.random.default_rng(1)
    risen = 0
    for _ in range(1000):
        before = rng.beta(2, 2, 200).astype(np.float32)
        after = np.clip(before + rng.normal(0, 0.2, 200), -1, 2).astype(np.float32)
        (found,) = read_gains(policy(), [sensed(before, after)])
        risen += found.has_risen
    assert risen <= 65


def report(verdict: Verdict, *, has_risen: bool) -> Reading:
    gain = GainReading(
        name="skill", n_items=9, gain=0.01, lower=-0.02, min_gain=0.05, has_risen=has_risen
    )
    return Reading(
        look=1,
        alpha=0.05,
        drop=0.0,
        stderr=0.01,
        lower=-0.01,
        upper=0.01,
        limit=0.03,
        p_regress=0.5,
        verdict=verdict,
        severe=False,
        gains=(gain,),
    )


def test_what_has_not_risen_is_said_or_refused() -> None:
    flat, risen = (report(Verdict.PASS, has_risen=each) for each in (False, True))
    said = judge_publication(policy(), flat, alpha=1.0)
    assert (said.publish, said.retention) == (True, "held")
    assert "skill was to rise and has not shown it: gain 0.0100, lower bound -0.0200" in said.reason
    refused = judge_publication(policy(on_no_gain="refuse"), flat, alpha=1.0)
    assert (refused.publish, refused.retention, refused.failure) == (False, None, "no_gain")
    for each in (policy(), policy(on_no_gain="refuse")):
        assert judge_publication(each, risen, alpha=1.0).reason == (
            judge_publication(Policy(), risen, alpha=1.0).reason
        )
    regressed = report(Verdict.REGRESS, has_risen=False)
    assert judge_publication(policy(), regressed, alpha=1.0).failure == "retention_not_met"


@pytest.mark.parametrize(
    "wish", [{"min_gain": 0.1}, {"expect": "rise", "min_gain": -1}, {"expect": "fall"}]
)
def test_a_wish_that_makes_no_sense_is_refused(wish) -> None:
    with pytest.raises(ValueError, match=r"min_gain|expect"):
        Policy.model_validate({"benchmarks": [{"name": "skill"} | wish]})
