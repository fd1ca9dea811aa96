"""The law of the `dual` controller: dual ascent on log strength, by estimates, at every evaluation."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from app.domain.decisions import ControllerState, LeverState, Reading, Verdict
from app.domain.policy import Dual

SMALLEST_TURN: Final = 0.01  # relative; less is not worth an order
SHRUNK: Final = 0.9  # a drop under this share of what it was has answered to the raises


class Turn(NamedTuple):
    """A strength that the law moves."""

    lever: LeverState
    before: float
    after: float


def worst_excess(reading: Reading) -> float | None:
    """The worst estimate as a multiple of its limit; None where nothing was measured."""
    ratios = [
        drop / limit
        for drop, limit in [(reading.drop, reading.limit)]
        + [(b.drop, b.limit) for b in reading.benchmarks]
        if drop is not None and limit is not None
    ]
    return max(ratios, default=None)


def aimed_excess(law: Dual, reading: Reading) -> float | None:
    """The worst estimate as a multiple of what the law aims at; None where nothing was measured.

    It aims below the limit by the width of the 95 % upper bound, at most by half the limit, as searches along
    the line to the base do: at the limit itself no checkpoint passes, so none that was trained to the end
    could be published as good.
    """
    ratios = [
        drop / (limit - min(law.headroom * (upper - drop), limit / 2))
        for drop, upper, limit in [(reading.drop, reading.upper, reading.limit)]
        + [(b.drop, b.upper, b.limit) for b in reading.benchmarks]
        if drop is not None and upper is not None and limit is not None
    ]
    return max(ratios, default=None)


def next_strength(law: Dual, strength: float, error: float, *, floor: float, cap: float) -> float:
    """Card 7's law on log strength: strength * exp(kappa * error), within its bounds.

    The strength is the law's only memory, so at a bound nothing winds up: the first error of the other
    sign moves it away.

    Args:
        law: Its constants.
        strength: In force, above 0.
        error: (drop - aim) / aim, smoothed.
        floor: Lowest strength.
        cap: Highest strength.
    """
    most = math.log(law.max_factor)
    step = min(max(law.kappa * error, -most), most)
    return min(max(strength * math.exp(step), floor), cap)


def observe(law: Dual, state: ControllerState, reading: Reading) -> ControllerState:
    """The state with this evaluation in the smoothed error, which never exceeds what one step can use."""
    excess = aimed_excess(law, reading)
    if excess is None:
        return state
    most = math.log(law.max_factor) / law.kappa
    error = min(max(excess - 1.0, -most), most)
    before = error if state.excess_smoothed is None else state.excess_smoothed
    update: dict[str, float | None] = {
        "excess_smoothed": law.smoothing * error + (1.0 - law.smoothing) * before
    }
    if excess <= 1.0:
        update |= {"law_factor": 1.0, "law_excess": None}
    return state.model_copy(update=update)


def is_futile(law: Dual, state: ControllerState, reading: Reading) -> bool:
    """Whether raises on estimates have not shrunk the drop: then it is no matter of strength."""
    excess = worst_excess(reading)
    return (
        state.law_factor >= law.futile_factor
        and state.law_excess is not None
        and excess is not None
        and excess > SHRUNK * state.law_excess
    )


def find_turn(
    law: Dual,
    levers: Sequence[LeverState],
    state: ControllerState,
    reading: Reading,
    *,
    is_settling: bool = False,
) -> Turn | None:
    """What the law moves after an evaluation without a confirmed regression; None: nothing worth an order.

    The first lever below its cap is raised toward the aim, the last one above its floor is lowered toward the
    dead zone's edge, so as not to cross it; the newest error and the smoothed one must agree. While a change
    before it settles nothing is lowered, nor raised when the drop is falling: what was done is at work. An armed
    strategy stays off: only a confirmed drop activates it.
    """
    excess, error = aimed_excess(law, reading), state.excess_smoothed
    if excess is None or error is None:
        return None
    if excess > 1.0 and error > 0.0:
        is_at_work = is_settling and excess - 1.0 < error
        if is_at_work or is_futile(law, state, reading):
            return None
        return _first_turn(law, levers, state, error)
    if not is_settling and _may_lower(reading) and max(excess - 1.0, error) < -law.deadzone:
        beyond = (1.0 + error) / (1.0 - law.deadzone) - 1.0
        return _first_turn(law, levers[::-1], state, beyond)
    return None


def raised_by_law(state: ControllerState, turn: Turn, reading: Reading) -> ControllerState:
    """The state with a raise on estimates counted."""
    first = worst_excess(reading) if state.law_excess is None else state.law_excess
    factor = state.law_factor * turn.after / turn.before
    return state.model_copy(update={"law_factor": factor, "law_excess": first})


def rested(state: ControllerState) -> ControllerState:
    """The state without the law's memory, for a model that is another from here on."""
    return state.model_copy(update={"excess_smoothed": None, "law_factor": 1.0, "law_excess": None})


def _may_lower(reading: Reading) -> bool:
    """Less is only dared on what was measured in full: what has no scores may have fallen."""
    missing = {Verdict.NO_DATA}
    return reading.verdict in {Verdict.PASS, Verdict.INCONCLUSIVE} and not any(
        b.verdict in missing for b in reading.benchmarks
    )


def _first_turn(
    law: Dual, levers: Sequence[LeverState], state: ControllerState, error: float
) -> Turn | None:
    for lever in levers:
        strength = state.strengths[lever.strategy]
        if strength == 0:
            continue
        floor = min(law.floor * lever.asked, strength)
        cap = max(lever.cap, strength)
        after = next_strength(law, strength, error, floor=floor, cap=cap)
        if abs(after / strength - 1.0) >= SMALLEST_TURN:
            return Turn(lever, strength, after)
    return None
