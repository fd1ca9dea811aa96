"""The levers: which strengths the controller may turn, in which order, and how far."""

from collections.abc import Sequence

from app.domain.decisions import ControllerState, LeverState
from app.domain.policy import Policy
from app.domain.strategies import CARDS, StrategyConfig, default_strength, strength_in_force
from app.domain.wording import number_text
from app.errors import BadRequest


def initial_state(strategies: Sequence[StrategyConfig], *, lora: bool) -> ControllerState:
    """The coefficients at which a run starts."""
    return ControllerState(
        strengths={config.type: strength_in_force(config, lora=lora) for config in strategies}
    )


def build_levers(
    strategies: Sequence[StrategyConfig], policy: Policy, *, lora: bool
) -> tuple[LeverState, ...]:
    """The strengths that may be turned, in the order in which they are taken.

    `policy.lever` comes first, the others by their cards' rank. A strategy that the job set to strength 0
    without arming it is off and no lever. Caps count from the strength asked for, of an armed one from its
    default; a card's cap never lies below what was asked.
    """
    levers = []
    for config in sorted(
        strategies, key=lambda c: (c.type != policy.lever, CARDS[c.type].lever_rank)
    ):
        asked = strength_in_force(config, lora=lora)
        if asked == 0 and not config.armed:
            continue
        default = default_strength(config.type, lora=lora)
        initial = default if config.armed else asked
        card_cap = CARDS[config.type].cap
        cap = (
            policy.ladder.strength_cap_factor * initial
            if card_cap is None
            else max(card_cap, initial)
        )
        levers.append(
            LeverState(
                strategy=config.type, asked=asked, default=default, cap=cap, armed=config.armed
            )
        )
    return tuple(levers)


def check_lever(strategies: Sequence[StrategyConfig], policy: Policy) -> None:
    """Refuses a lever that the job can't turn; for submit.

    Raises:
        BadRequest: `policy.lever` names no strategy of the job, or one switched off by strength 0.
    """
    if policy.lever is None:
        return
    for config in strategies:
        if config.type == policy.lever and (config.armed or config.strength != 0):
            return
    raise BadRequest(
        f"lever: '{policy.lever}' is not a strategy of this job with a strength above 0, nor an armed one.",
        "retention.policy.lever",
        "unknown_lever",
    )


def turn_up(
    levers: Sequence[LeverState], state: ControllerState, factor: float
) -> tuple[LeverState, float, str] | None:
    """The first lever below its cap, its new strength and a clause saying so; an armed one is activated."""
    for lever in levers:
        strength = state.strengths[lever.strategy]
        if lever.armed and strength == 0:
            return (
                lever,
                lever.default,
                f"{lever.strategy} activated at {number_text(lever.default)}",
            )
        raised = min(strength * factor, lever.cap)
        if raised > strength:
            capped = " (its cap)" if raised == lever.cap else ""
            return (
                lever,
                raised,
                f"{lever.strategy} strength {number_text(strength)} -> {number_text(raised)}{capped}",
            )
    return None


def next_activation(
    levers: Sequence[LeverState], state: ControllerState, factor: float
) -> tuple[LeverState, float, str] | None:
    """What `turn_up` would do, where that is to activate an armed strategy."""
    turned = turn_up(levers, state, factor)
    return turned if turned is not None and state.strengths[turned[0].strategy] == 0 else None


def with_strength(state: ControllerState, strategy: str, strength: float) -> ControllerState:
    """The state with one strength set."""
    return state.model_copy(update={"strengths": {**state.strengths, strategy: strength}})
