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
from app.domain.levers import turn_up, with_strength
from app.domain.policy import Policy
from app.domain.proposals import mark_proposal
from app.domain.staging import cross_stages
from app.domain.wording import describe_reading, number_text


def decide(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """What to do after one evaluation point.

    The ladder of a confirmed regression is repair, raise (twice at most), learning rate, rollback, stop;
    a severe one or a value that is not finite starts at the rollback, and so does the last evaluation
    of a stage, after which no softer rung could show its effect. Nothing else changes a coefficient but a pass with
    room to spare, which lowers a raised strength. Equal arguments give equal decisions.

    Args:
        policy: Limits, ladder and patience of the job.
        levers: As `build_levers` orders them.
        state: As the last decision left it, else `initial_state`.
        look: The reading and what else is known at this point.
    """
    decision = cross_stages(_decide(policy, levers, state, look), look)
    return mark_proposal(policy, decision)


def _decide(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    state = state.model_copy(update={"evals": state.evals + 1, "branch": look.branch})
    reading = look.reading
    if reading.not_finite or not look.train_loss_finite:
        return _roll_back(
            policy,
            levers,
            state,
            look,
            "not_finite",
            "The loss or a score is not a finite number",
            (),
        )
    if reading.verdict is Verdict.REGRESS:
        return _climb(policy, levers, state, look)
    return _settle(policy, levers, state, look)


def _settle(
    policy: Policy, levers: Sequence[LeverState], state: ControllerState, look: Look
) -> Decision:
    """Keep, lower a raised strength, or stop early."""
    passed = look.reading.verdict is Verdict.PASS
    was_cooling = state.cool_down > 0
    state = _count_validation(policy, state, look)
    update: dict[str, int | bool | float | None] = {"cool_down": max(state.cool_down - 1, 0)}
    if passed:
        update |= {"raises_in_a_row": 0, "repaired": False, "excess_before_raise": None}
    state = state.model_copy(update=update)
    stopping = policy.early_stopping
    may_stop = stopping.enabled and look.is_in_last_stage
    if may_stop and state.evals_without_improvement >= stopping.patience:
        return Decision(
            action=Action.STOP,
            reason=(
                f"Validation cross-entropy has not improved on {number_text(state.best_valid_loss)} "
                f"for {state.evals_without_improvement} evaluations. {describe_reading(look.reading)}"
            ),
            code="early_stopping",
            state=state,
        )
    if passed and not look.is_gate and not was_cooling and _has_room(policy, look.reading):
        lowered = _lower(policy, levers, state, look.reading)
        if lowered is not None:
            return lowered
    code = "within_limit" if passed else str(look.reading.verdict)
    return Decision(
        action=Action.KEEP, reason=describe_reading(look.reading), code=code, state=state
    )


def _count_validation(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    """The early-stopping counter after this evaluation; one without a validation loss doesn't count."""
    loss = look.valid_loss
    if loss is None:
        return state
    best = state.best_valid_loss
    if best is None or loss < best - policy.early_stopping.min_delta:
        return state.model_copy(update={"best_valid_loss": loss, "evals_without_improvement": 0})
    if state.evals <= policy.early_stopping.warmup_evals:
        return state
    return state.model_copy(
        update={"evals_without_improvement": state.evals_without_improvement + 1}
    )


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
    if ladder.repair and look.repair_possible and not state.repaired:
        return Decision(
            action=Action.REPAIR,
            reason=f"{what} Scaling the change back toward the base.",
            code="drop_confirmed",
            state=_changed(policy, state.model_copy(update={"repaired": True})),
            alternatives=("raise_strength", "roll_back"),
        )
    passed_over.append(f"repair: {_why_no_repair(policy, state)}")
    if state.raises_in_a_row < ladder.max_raises:
        return _raise(policy, levers, state, look, tuple(passed_over))
    passed_over.append(f"raise_strength: done {state.raises_in_a_row} times in a row")
    previous, excess = state.excess_before_raise, _excess(look.reading)
    if (
        levers
        and state.raises_in_a_row
        and previous is not None
        and excess >= previous
        and not state.learning_rate_lowered
    ):
        scale = state.learning_rate_scale * ladder.learning_rate_factor
        return Decision(
            action=Action.LOWER_LEARNING_RATE,
            reason=(
                f"{what} The last raise did not shrink it ({number_text(previous)} -> {number_text(excess)} "
                f"times the limit): learning rate x{number_text(ladder.learning_rate_factor)}."
            ),
            code="raise_without_effect",
            state=_changed(
                policy,
                state.model_copy(
                    update={"learning_rate_scale": scale, "learning_rate_lowered": True}
                ),
            ),
            alternatives=(*passed_over, "roll_back"),
        )
    return _roll_back(policy, levers, state, look, "drop_confirmed", what, tuple(passed_over))


def _why_no_repair(policy: Policy, state: ControllerState) -> str:
    if not policy.ladder.repair:
        return "off by policy"
    return "done since the last pass" if state.repaired else "not possible for this run"


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
                "excess_before_raise": _excess(look.reading),
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
    kept = [
        c.valid_loss
        for c in look.checkpoints
        if c.status != "bad" and 0 < c.step <= target.step and c.valid_loss is not None
    ]
    state = _changed(policy, state).model_copy(
        update={
            "branch": look.branch + 1,
            "rollbacks": state.rollbacks + 1,
            "raises_in_a_row": 0,
            "excess_before_raise": None,
            "repaired": False,
            "learning_rate_scale": state.learning_rate_scale * ladder.rollback_learning_rate_factor,
            "best_valid_loss": min(kept, default=None),
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
    return state.model_copy(
        update={"evals_without_improvement": 0, "cool_down": policy.ladder.cool_down_evals}
    )


def _excess(reading: Reading) -> float:
    """The worst estimate as a multiple of its limit."""
    ratios = [
        drop / limit
        for drop, limit in [(reading.drop, reading.limit)]
        + [(b.drop, b.limit) for b in reading.benchmarks]
        if drop is not None and limit is not None
    ]
    return max(ratios, default=0.0)
