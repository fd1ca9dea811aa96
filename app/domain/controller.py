"""The controller: `decide()`, a pure function from policy, levers, state and evidence to what is done."""

from collections.abc import Sequence

from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
    Reading,
    Verdict,
)
from app.domain.diagnosis import can_repair, replay_rate, why_no_repair, with_diagnosis
from app.domain.dual import (
    find_turn,
    is_futile,
    observe,
    raised_by_law,
    rested,
    worst_excess,
)
from app.domain.levers import next_activation, turn_up, with_strength
from app.domain.policy import Policy
from app.domain.proposals import mark_proposal
from app.domain.staging import cross_stages
from app.domain.stopping import (
    EARLY_STOPPING,
    count_improvement,
    counted_anew,
    describe_exhaustion,
    is_exhausted,
    rewind_metric,
)
from app.domain.wording import describe_reading, number_text


def decide(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """What to do after one evaluation point.

    The ladder of a confirmed regression is repair, raise (twice at most), learning rate, rollback, stop;
    a severe one or a value that is not finite starts at the rollback, and so does the last evaluation
    of a stage, after which no softer rung could show its effect. Nothing else changes a coefficient but, under
    `deadband`, a pass with room to spare, which lowers a raised strength, and under `dual` its law, by estimates.
    Where the diagnosis says that knowledge was lost, repair comes last.
    Equal arguments give equal decisions.

    Args:
        policy: Limits, ladder and patience of the job.
        levers: As `build_levers` orders them.
        state: As the last decision left it, else `initial_state`.
        look: The reading and what else is known at this point.
    """
    decision = cross_stages(_decide(policy, levers, state, look), look)
    decision = with_diagnosis(decision, look)
    return mark_proposal(policy, decision)


def _decide(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    state = state.model_copy(update={"evals": state.evals + 1, "branch": look.branch})
    reading = look.reading
    if not look.is_finite:
        return _roll_back(
            policy,
            levers,
            state,
            look,
            "not_finite",
            "The loss or a score is not a finite number",
            (),
        )
    if policy.controller == "dual":
        state = observe(policy.dual, state, reading)
    if reading.verdict is Verdict.REGRESS:
        return _climb(policy, levers, state, look)
    return _settle(policy, levers, state, look)


def _settle(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """Keep, turn a strength without a confirmed regression, or stop early."""
    passed = look.reading.verdict is Verdict.PASS
    was_cooling = state.cool_down > 0
    state = count_improvement(policy, state, look)
    update: dict[str, int | bool | float | None] = {"cool_down": max(state.cool_down - 1, 0)}
    if passed:
        update |= {"raises_in_a_row": 0, "repaired": False, "excess_before_raise": None}
    state = state.model_copy(update=update)
    if look.is_in_last_stage and is_exhausted(policy, state):
        return Decision(
            action=Action.STOP,
            reason=f"{describe_exhaustion(policy, state)} {describe_reading(look.reading)}",
            code=EARLY_STOPPING,
            state=state,
        )
    if not look.is_gate:
        turned = (
            _follow_law(policy, levers, state, look.reading, was_cooling=was_cooling)
            if policy.controller == "dual"
            else _use_room(policy, levers, state, look.reading, was_cooling=was_cooling)
        )
        if turned is not None:
            return turned
    code = "within_limit" if passed else str(look.reading.verdict)
    return Decision(
        action=Action.KEEP, reason=describe_reading(look.reading), code=code, state=state
    )


def _follow_law(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    reading: Reading,
    *,
    was_cooling: bool,
) -> Decision | None:
    """What the law of `dual` turns; a raise makes the objective another, so patience counts anew."""
    turn = find_turn(policy.dual, levers, state, reading, is_settling=was_cooling)
    if turn is None:
        return None
    is_raise = turn.after > turn.before
    counted = state.model_copy(update={"cool_down": policy.ladder.cool_down_evals})
    if is_raise:
        counted = _changed(policy, raised_by_law(state, turn, reading))
    return Decision(
        action=Action.RAISE_STRENGTH if is_raise else Action.LOWER_STRENGTH,
        reason=(
            f"{describe_reading(reading)} By its estimate, smoothed to"
            f" {number_text(1.0 + (state.excess_smoothed or 0.0))} times its aim: {turn.lever.strategy}"
            f" strength {number_text(turn.before)} -> {number_text(turn.after)}."
        ),
        code="law_raised" if is_raise else "law_lowered",
        state=with_strength(counted, turn.lever.strategy, turn.after),
        lever=turn.lever.strategy,
        alternatives=("keep",),
    )


def _use_room(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    reading: Reading,
    *,
    was_cooling: bool,
) -> Decision | None:
    """Under `deadband` a pass with room to spare lowers a raised strength."""
    if was_cooling or reading.verdict is not Verdict.PASS or not _has_room(policy, reading):
        return None
    return _lower(policy, levers, state, reading)


def _has_room(policy: Policy, reading: Reading) -> bool:
    """Whether every upper bound that a pass rests on is under the share of its limit that allows lowering."""
    share = policy.ladder.lower_below
    pairs = [(reading.upper, reading.limit)] + [(b.upper, b.limit) for b in reading.benchmarks]
    return all(
        upper < share * limit for upper, limit in pairs if upper is not None and limit is not None
    )


def _lower(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, reading: Reading
) -> Decision | None:
    """Lowers the strength that was raised last in the order of levers; None when all are as asked."""
    for lever in reversed(levers):
        strength = state.strengths[lever.strategy]
        lowered = max(lever.asked, strength * policy.ladder.lower_factor)
        if lowered < strength:
            return Decision(
                action=Action.LOWER_STRENGTH,
                reason=(
                    f"{describe_reading(reading)} That is under {policy.ladder.lower_below:.0%} of the limit: "
                    f"{lever.strategy} strength {number_text(strength)} -> {number_text(lowered)}."
                ),
                code="room_to_lower",
                state=with_strength(state, lever.strategy, lowered).model_copy(
                    update={"cool_down": policy.ladder.cool_down_evals}
                ),
                lever=lever.strategy,
                alternatives=("keep",),
            )
    return None


def _climb(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """The first rung that is open on a confirmed regression."""
    ladder, what = policy.ladder, describe_reading(look.reading)
    passed_over: list[str] = []
    if look.reading.severe:
        what += " A lower bound is above twice its limit."
        return _roll_back(policy, levers, state, look, "severe_drop", what, ())
    if look.is_gate:
        left = "training" if look.is_last else "training of this stage"
        what += f" No {left} is left in which a softer step could show its effect."
        return _roll_back(policy, levers, state, look, "drop_confirmed", what, ())
    closed = why_no_repair(policy, state, look)
    if closed is None:
        return _repair(policy, levers, state, look, what)
    passed_over.append(f"repair: {closed}")
    futile = policy.controller == "dual" and is_futile(policy.dual, state, look.reading)
    if state.raises_in_a_row < ladder.max_raises and not futile:
        return _raise(policy, levers, state, look, tuple(passed_over))
    passed_over.append(
        f"raise_strength: x{number_text(state.law_factor)} by the law had no effect"
        if futile
        else f"raise_strength: done {state.raises_in_a_row} times in a row"
    )
    previous = state.law_excess if futile else state.excess_before_raise
    slower = _slow_down(policy, levers, state, look, previous, tuple(passed_over))
    if slower is not None:
        return slower
    is_end = _target(look) is None or state.rollbacks >= ladder.max_rollbacks
    if is_end and can_repair(policy, state, look):  # put behind the others by the diagnosis alone
        return _repair(policy, levers, state, look, what)
    return _roll_back(policy, levers, state, look, "drop_confirmed", what, tuple(passed_over))


def _repair(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look, what: str
) -> Decision:
    """Replay steps where format was lost, and back toward the base.

    Where an armed strategy comes next it is activated with it, or the drop would return.
    """
    state = _changed(policy, rested(state).model_copy(update={"repaired": True}))
    activation = next_activation(levers, state, policy.ladder.raise_factor)
    how = "Scaling the change back toward the base"
    if replay_rate(look.diagnosis) is not None:
        how = "Replay steps for good, then, where they do not suffice, scaling back toward the base"
    if activation is not None:
        lever, strength, clause = activation
        state = with_strength(state, lever.strategy, strength)
        how += f"; {clause}"
    return Decision(
        action=Action.REPAIR,
        reason=f"{what} {how}.",
        code="drop_confirmed",
        state=state,
        lever=None if activation is None else activation[0].strategy,
        alternatives=("raise_strength", "roll_back"),
    )


def _slow_down(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    look: Look,
    previous: float | None,
    passed_over: tuple[str, ...],
) -> Decision | None:
    """The learning rate down, once in a job, when raises did not shrink the drop from `previous` limits."""
    excess, factor = worst_excess(look.reading) or 0.0, policy.ladder.learning_rate_factor
    if not levers or previous is None or excess < previous or state.learning_rate_lowered:
        return None
    scale = state.learning_rate_scale * factor
    lowered = state.model_copy(update={"learning_rate_scale": scale, "learning_rate_lowered": True})
    return Decision(
        action=Action.LOWER_LEARNING_RATE,
        reason=(
            f"{describe_reading(look.reading)} The last raise did not shrink it ({number_text(previous)} ->"
            f" {number_text(excess)} times the limit): learning rate x{number_text(factor)}."
        ),
        code="raise_without_effect",
        state=_changed(policy, lowered),
        alternatives=(*passed_over, "roll_back"),
    )


def _raise(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    look: Look,
    passed_over: tuple[str, ...],
) -> Decision:
    """Turns the lever up; without one that still turns, the learning rate down."""
    what = describe_reading(look.reading)
    counted = _changed(
        policy,
        state.model_copy(
            update={
                "raises_in_a_row": state.raises_in_a_row + 1,
                "excess_before_raise": worst_excess(look.reading) or 0.0,
            }
        ),
    )
    turned = turn_up(levers, state, policy.ladder.raise_factor)
    if turned is None:
        scale = state.learning_rate_scale * policy.ladder.learning_rate_factor
        reason = f"{what} No strength can be raised: learning rate x{number_text(policy.ladder.learning_rate_factor)}."
        return Decision(
            action=Action.LOWER_LEARNING_RATE,
            reason=reason,
            code="no_lever",
            state=counted.model_copy(update={"learning_rate_scale": scale}),
            alternatives=(*passed_over, "roll_back"),
        )
    lever, strength, how = turned
    return Decision(
        action=Action.RAISE_STRENGTH,
        reason=f"{what} {how}.",
        code="drop_confirmed",
        state=with_strength(counted, lever.strategy, strength),
        lever=lever.strategy,
        alternatives=(*passed_over, "roll_back"),
    )


def _roll_back(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    look: Look,
    code: str,
    what: str,
    passed_over: tuple[str, ...],
) -> Decision:
    """Back to the last good checkpoint with more strength and a smaller step; `stop` when that is used up."""
    ladder = policy.ladder
    what = what.rstrip(".")
    target = _target(look)
    if target is None or state.rollbacks >= ladder.max_rollbacks:
        why = (
            "there is no checkpoint to return to"
            if target is None
            else f"{state.rollbacks} rollbacks did not help"
        )
        return Decision(
            action=Action.STOP,
            reason=f"{what}; {why}.",
            code="could_not_hold",
            state=state.model_copy(update={"could_not_hold": True}),
            alternatives=(*passed_over, f"roll_back: {why}"),
        )
    state = rewind_metric(rested(state), look.checkpoints, target.step)
    state = _changed(policy, state).model_copy(
        update={
            "branch": look.branch + 1,
            "rollbacks": state.rollbacks + 1,
            "raises_in_a_row": 0,
            "excess_before_raise": None,
            "repaired": False,
            "learning_rate_scale": state.learning_rate_scale * ladder.rollback_learning_rate_factor,
        }
    )
    turned = turn_up(levers, state, ladder.rollback_strength_factor)
    how = "no strength can be raised"
    if turned is not None:
        lever, strength, how = turned
        state = with_strength(state, lever.strategy, strength)
    return Decision(
        action=Action.ROLL_BACK,
        reason=(
            f"{what}; back to step {target.step} ({target.status if target.step else 'the start'}), {how}, "
            f"learning rate x{number_text(ladder.rollback_learning_rate_factor)}, "
            f"rollback {state.rollbacks} of {ladder.max_rollbacks}."
        ),
        code=code,
        state=state,
        target_checkpoint_id=target.checkpoint_id,
        lever=None if turned is None else turned[0].strategy,
        alternatives=(*passed_over, "stop"),
        details={"target_step": target.step, "target_status": target.status},
    )


def _target(look: Look) -> CheckpointFact | None:
    """The last good checkpoint, else the last unproven one, else the start."""
    before = [
        c for c in look.checkpoints if c.step == 0 or (c.branch, c.step) != (look.branch, look.step)
    ]
    for status in ("good", "unproven"):
        matching = [c for c in before if c.status == status and c.step > 0]
        if matching:
            return max(matching, key=lambda c: (c.step, c.branch))
    return next((c for c in before if c.step == 0), None)


def _changed(policy: Policy, state: ControllerState) -> ControllerState:
    """After a change the objective is another: patience counts anew, and lowering waits."""
    return counted_anew(state).model_copy(update={"cool_down": policy.ladder.cool_down_evals})
