"""The law of `dual`: its aim, its fixed point, what it may turn, and that nothing is stored at a bound."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.controller import decide
from app.domain.decisions import (
    Action,
    BenchmarkReading,
    CheckpointFact,
    ControllerState,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.dual import (
    aimed_excess,
    find_turn,
    is_futile,
    next_strength,
    observe,
    raised_by_law,
    rested,
    worst_excess,
)
from app.domain.policy import Dual, EarlyStopping, Ladder, Policy
from app.domain.replay import replay
from app.errors import Conflict

LAW = Dual()
EWC = LeverState(strategy="ewc", asked=1.0, default=1.0, cap=1000.0)
REPLAY = LeverState(strategy="replay", asked=0.1, default=0.1, cap=0.5)
ARMED = LeverState(strategy="ewc", asked=0.0, default=100.0, cap=100_000.0, armed=True)
START = CheckpointFact(checkpoint_id="start", branch=0, step=0, status="good", valid_loss=None)


def read(
    drop: float | None,
    verdict: Verdict = Verdict.INCONCLUSIVE,
    *,
    width: float = 0.006,
    benchmarks: tuple[BenchmarkReading, ...] = (),
) -> Reading:
    """A reading whose 95 % upper bound is `width` above its estimate."""
    return Reading(
        look=1,
        alpha=0.006,
        drop=drop,
        stderr=None if drop is None else width / 1.645,
        lower=None if drop is None else drop - 2 * width,
        upper=None if drop is None else drop + width,
        limit=0.03,
        p_regress=None,
        verdict=verdict,
        severe=False,
        benchmarks=benchmarks,
    )


def text(rise: float | None, verdict: Verdict = Verdict.PASS) -> BenchmarkReading:
    return BenchmarkReading(
        name="text",
        benchmark_version_id="text-1",
        scorer="nll",
        weight=1.0,
        n_items=0 if rise is None else 400,
        baseline=2.5,
        value=None,
        drop=rise,
        lower=None,
        upper=None if rise is None else rise + 0.01,
        limit=0.05,
        p_regress=None,
        verdict=verdict,
    )


def look(reading: Reading, *, step: int = 30, valid_loss: float | None = None) -> Look:
    return Look(
        branch=0,
        step=step,
        is_last=False,
        reading=reading,
        valid_loss=valid_loss,
        checkpoints=(START,),
    )


def state(**changes: object) -> ControllerState:
    return ControllerState.model_validate({"strengths": {"ewc": 8.0, "replay": 0.1}} | changes)


def test_it_aims_below_the_limit_by_the_width_of_the_upper_bound() -> None:
    assert aimed_excess(LAW, read(0.024)) == pytest.approx(1.0)  # where a pass begins
    assert aimed_excess(LAW, read(0.012)) == pytest.approx(0.5)
    assert aimed_excess(Dual(headroom=0), read(0.03)) == pytest.approx(1.0)
    assert aimed_excess(LAW, read(0.0)) == 0.0


def test_it_never_aims_under_half_the_limit_however_few_the_items() -> None:
    assert aimed_excess(LAW, read(0.015, width=0.2)) == pytest.approx(1.0)


def test_the_worst_of_mean_and_limited_benchmarks_counts() -> None:
    assert aimed_excess(LAW, read(0.012, benchmarks=(text(0.08),))) == pytest.approx(2.0)
    assert aimed_excess(LAW, read(0.024, benchmarks=(text(0.0), text(None)))) == pytest.approx(1.0)
    assert aimed_excess(LAW, read(None)) is None


def test_dual_ascent_converges_to_the_multiplier_of_the_exact_problem() -> None:
    """min 1/2 |x - a|^2 subject to 1/2 |x|^2 <= c has the multiplier |a| / sqrt(2 c) - 1."""
    length, limit, strength = 3.0, 0.5, 0.01
    for _ in range(400):
        solution = length / (1.0 + strength)
        error = 0.5 * solution**2 / limit - 1.0
        strength = next_strength(LAW, strength, error, floor=1e-6, cap=1e6)
    assert strength == pytest.approx(length / math.sqrt(2 * limit) - 1.0, rel=1e-12)


@given(
    st.floats(1e-3, 1e3),
    st.floats(-1e6, 1e6),
    st.floats(0.1, 10),
    st.floats(1.01, 1000),
)
def test_a_step_keeps_its_bounds_and_its_sign(
    strength: float, error: float, kappa: float, most: float
) -> None:
    law = Dual(kappa=kappa, max_factor=most)
    after = next_strength(law, strength, error, floor=1e-3, cap=1e3)
    assert 1e-3 <= after <= 1e3
    assert strength / most * (1 - 1e-9) <= after <= strength * most * (1 + 1e-9)
    assert (after - strength) * error >= 0 or math.isclose(after, strength)


def test_the_smoothed_error_is_held_within_what_one_step_can_use() -> None:
    most = math.log(LAW.max_factor) / LAW.kappa
    seen = state()
    for _ in range(500):
        seen = observe(LAW, seen, read(0.6, Verdict.REGRESS))
    assert seen.excess_smoothed == pytest.approx(most)
    relaxed = observe(LAW, observe(LAW, seen, read(0.0)), read(0.0))
    assert relaxed.excess_smoothed is not None
    assert relaxed.excess_smoothed < -LAW.deadzone  # two looks, however long it stood at the bound


def test_a_look_without_a_measurement_leaves_its_memory() -> None:
    before = state(excess_smoothed=0.4)
    assert observe(LAW, before, read(None)) == before
    assert find_turn(LAW, [EWC], before, read(None)) is None


@pytest.mark.parametrize(
    ("drop", "smoothed", "after"),
    [
        (0.036, 0.5, 8.0 * math.exp(0.25)),  # both above the aim
        (0.036, -0.1, None),  # the newest alone
        (0.02, 0.3, None),  # the smoothed alone
        (0.02, -0.2, None),  # within the dead zone
        (0.0, -0.2, None),
        (0.02, -0.9, None),
        (0.0, -0.7, 8.0 * math.exp(-0.25)),  # half the way under the zone's edge
        (0.036, 1e-3, None),  # not worth an order
    ],
)
def test_a_strength_is_turned_where_newest_and_smoothed_error_agree(
    drop: float, smoothed: float, after: float | None
) -> None:
    turn = find_turn(LAW, [EWC], state(excess_smoothed=smoothed), read(drop))
    assert (None if turn is None else turn.after) == (
        None if after is None else pytest.approx(after)
    )


def test_levers_are_raised_from_the_first_and_lowered_from_the_last() -> None:
    levers = [EWC, REPLAY]
    at_cap = state(strengths={"ewc": 1000.0, "replay": 0.2}, excess_smoothed=1.0)
    raised = find_turn(LAW, levers, at_cap, read(0.06))
    assert raised is not None
    assert raised.lever == REPLAY
    assert raised.after == pytest.approx(0.2 * math.exp(0.5))
    low = at_cap.model_copy(update={"excess_smoothed": -1.0})
    lowered = find_turn(LAW, levers, low, read(0.0))
    assert lowered is not None
    assert lowered.lever == REPLAY
    assert lowered.after == pytest.approx(0.2 * math.exp(-0.5))
    as_asked = low.model_copy(update={"strengths": {"ewc": 1000.0, "replay": 0.1}})
    lowered = find_turn(LAW, levers, as_asked, read(0.0))
    assert lowered is not None
    assert lowered.lever == EWC


def test_the_floor_is_what_was_asked_or_the_share_that_the_policy_allows() -> None:
    as_asked = state(strengths={"ewc": 1.0}, excess_smoothed=-1.0)
    assert find_turn(LAW, [EWC], as_asked, read(0.0)) is None
    lowered = find_turn(Dual(floor=0.8), [EWC], as_asked, read(0.0))
    assert lowered is not None
    assert lowered.after == pytest.approx(0.8)


@pytest.mark.parametrize("drop", [0.0, 0.029, 0.5])
def test_an_armed_strategy_stays_off_without_a_confirmed_drop(drop: float) -> None:
    off = state(strengths={"ewc": 0.0}, excess_smoothed=1.0)
    decision = decide(Policy(controller="dual"), [ARMED], off, look(read(drop)))
    assert decision.action is Action.KEEP
    assert decision.state.strengths == {"ewc": 0.0}


def test_less_is_not_dared_while_a_benchmark_has_no_scores() -> None:
    low = state(excess_smoothed=-1.0)
    missing = read(0.0, benchmarks=(text(None, Verdict.NO_DATA),))
    assert find_turn(LAW, [EWC], low, missing) is None
    assert find_turn(LAW, [EWC], low, read(0.0, benchmarks=(text(0.0),))) is not None


def test_raises_that_do_not_shrink_the_drop_are_given_up() -> None:
    seen = state()
    for _ in range(10):
        seen = observe(LAW, seen, read(0.045))
        turn = find_turn(LAW, [EWC], seen, read(0.045))
        if turn is None:
            break
        seen = raised_by_law(
            seen.model_copy(update={"strengths": {"ewc": turn.after}}), turn, read(0.045)
        )
    assert is_futile(LAW, seen, read(0.045))
    assert LAW.futile_factor <= seen.law_factor <= LAW.futile_factor * LAW.max_factor
    assert seen.law_excess == worst_excess(read(0.045))
    assert not is_futile(LAW, seen, read(0.04))  # it has answered after all
    assert observe(LAW, seen, read(0.01)).law_factor == 1.0  # and has come home
    assert rested(seen).law_factor == 1.0
    assert rested(seen).excess_smoothed is None


def test_after_useless_raises_a_confirmed_drop_lowers_the_learning_rate() -> None:
    futile = state(law_factor=9.0, law_excess=1.5, excess_smoothed=0.5)
    policy = Policy(controller="dual", ladder=Ladder(repair=False))
    slower = decide(policy, [EWC], futile, look(read(0.05, Verdict.REGRESS)))
    assert (slower.action, slower.code) == (Action.LOWER_LEARNING_RATE, "raise_without_effect")
    assert slower.state.strengths == futile.strengths
    back = decide(policy, [EWC], slower.state, look(read(0.05, Verdict.REGRESS)))
    assert back.action is Action.ROLL_BACK
    assert (back.state.law_factor, back.state.excess_smoothed) == (1.0, None)


@pytest.mark.parametrize("cool_down", [0, 1, 3])
def test_after_a_turn_of_the_law_lowering_waits_for_the_cool_down(cool_down: int) -> None:
    policy = Policy(controller="dual", ladder=Ladder(cool_down_evals=cool_down))
    now = state(strengths={"ewc": 100.0}, excess_smoothed=0.5)
    decision = decide(policy, [EWC], now, look(read(0.06)))
    assert decision.code == "law_raised"
    actions = []
    for _ in range(2 * (cool_down + 1) + 2):
        now = decision.state
        decision = decide(policy, [EWC], now, look(read(-0.05, Verdict.PASS)))
        actions.append(decision.action)
    lowered = [at for at, action in enumerate(actions) if action is Action.LOWER_STRENGTH]
    assert len(lowered) >= 2
    assert lowered[0] >= cool_down
    assert all(b - a == cool_down + 1 for a, b in itertools.pairwise(lowered))


def test_a_raise_by_the_law_does_not_wait_while_the_drop_grows() -> None:
    now = state(excess_smoothed=0.5, cool_down=1)
    decision = decide(Policy(controller="dual"), [EWC], now, look(read(0.06)))
    assert decision.code == "law_raised"


def test_while_a_change_settles_a_falling_drop_is_not_answered_by_more() -> None:
    policy = Policy(controller="dual")
    settling = state(excess_smoothed=1.0, cool_down=1)
    falling = decide(policy, [EWC], settling, look(read(0.036)))
    assert (falling.action, falling.state.cool_down) == (Action.KEEP, 0)
    after = decide(policy, [EWC], falling.state, look(read(0.036)))
    assert after.code == "law_raised"  # one evaluation, no longer
    rising = decide(policy, [EWC], settling, look(read(0.072)))
    assert rising.code == "law_raised"


def test_a_raise_by_the_law_counts_patience_anew_and_a_lowering_does_not() -> None:
    policy = Policy(controller="dual", early_stopping=EarlyStopping(patience=5))
    tired = state(excess_smoothed=0.5, best_valid_loss=0.5, evals=9, evals_without_improvement=3)
    raised = decide(policy, [EWC], tired, look(read(0.06), valid_loss=0.6))
    assert raised.code == "law_raised"
    assert raised.state.evals_without_improvement == 0
    calm = tired.model_copy(update={"excess_smoothed": -1.0})
    lowered = decide(policy, [EWC], calm, look(read(0.0, Verdict.PASS), valid_loss=0.6))
    assert lowered.code == "law_lowered"
    assert lowered.state.evals_without_improvement == 4


def test_the_reason_names_the_numbers_it_rests_on() -> None:
    decision = decide(Policy(controller="dual"), [EWC], state(), look(read(0.048)))
    assert decision.code == "law_raised"
    assert "4.80%" in decision.reason
    assert "2 times its aim" in decision.reason
    assert "ewc strength 8 ->" in decision.reason
    assert decision.alternatives == ("keep",)


def test_evidence_of_the_law_before_this_one_is_refused_and_not_recomputed_otherwise() -> None:
    policy, seen = Policy(controller="dual"), state()
    evidence: dict[str, Any] = {
        "policy": policy.model_dump(mode="json"),
        "levers": [EWC.model_dump(mode="json")],
        "state": seen.model_dump(mode="json"),
        "look": look(read(0.048)).model_dump(mode="json"),
    }
    assert replay(evidence).code == "law_raised"
    del evidence["policy"]["dual"]["headroom"]
    with pytest.raises(Conflict) as caught:
        replay(evidence)
    assert caught.value.code == "older_law"
    evidence["policy"]["controller"] = "deadband"
    assert replay(evidence).code == "inconclusive"
