"""What a person may order against a decision, and what becomes of it: a pure function, replayed like `decide()`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from app.domain.decisions import (
    Action,
    CheckpointFact,
    ControllerState,
    Decision,
    LeverState,
    Look,
)
from app.domain.frozen import Frozen
from app.domain.levers import with_strength
from app.domain.policy import Policy
from app.domain.stopping import counted_anew
from app.domain.wording import number_text
from app.errors import BadRequest, Conflict

Reason = Annotated[str, Field(min_length=1, max_length=1000)]


class SetStrengthOverride(Frozen):
    """Train on with this strength, also below what the job asked for."""

    action: Literal["set_strength"]
    reason: Reason
    strategy: str = Field(min_length=1, max_length=64)
    strength: float = Field(ge=0)


class KeepTrainingOverride(Frozen):
    """Train on as before the decision: the coefficients that it changed go back."""

    action: Literal["keep_training"]
    reason: Reason


class RollBackOverride(Frozen):
    """Go back to a saved state that is still valid, named by its id or its step (0: the start)."""

    action: Literal["roll_back"]
    reason: Reason
    checkpoint: str | None = Field(default=None, min_length=1, max_length=64)
    step: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _names_one(self) -> "RollBackOverride":
        if (self.checkpoint is None) == (self.step is None):
            raise ValueError("step: give either a step or a checkpoint")
        return self


class StopOverride(Frozen):
    """End the training now."""

    action: Literal["stop"]
    reason: Reason


Override = Annotated[
    SetStrengthOverride | KeepTrainingOverride | RollBackOverride | StopOverride,
    Field(discriminator="action"),
]
OVERRIDE: TypeAdapter[Override] = TypeAdapter(Override)


class Accept(Frozen):
    """`POST .../decisions/{id}/accept`: have a proposal carried out."""

    reason: Reason | None = None


class OverrideEvidence(Frozen):
    """What an override rests on beside the controller's own arguments."""

    asked: Override
    reason: str
    by: str  # the key's public part
    decision_id: str  # of the decision that was overridden
    before: dict[str, Any]  # a ControllerState: as it was before that decision
    after: dict[str, Any]  # and as that decision left it
    action: str  # what that decision did


def override(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    look: Look,
    evidence: OverrideEvidence,
) -> Decision:
    """What a person's order does; equal arguments give equal decisions.

    Args:
        policy: The job's.
        levers: What can be turned now.
        state: The coefficients in force.
        look: The evidence of the overridden decision, with what can be gone back to now.
        evidence: The order.

    Raises:
        BadRequest: A strategy that can't be turned, a strength above its cap.
        Conflict: It would change nothing, can't be undone, or its target is no longer valid.
    """
    asked = evidence.asked
    match asked:
        case SetStrengthOverride():
            return _set_strength(policy, levers, state, asked)
        case KeepTrainingOverride():
            return _keep(policy, state, evidence)
        case RollBackOverride():
            return _roll_back(policy, state, look, asked)
        case StopOverride():
            return Decision(
                action=Action.STOP,
                reason=f"Ordered: {asked.reason}",
                code="override_stop",
                state=state,
            )


def _set_strength(
    policy: Policy,
    levers: Sequence[LeverState],
    state: ControllerState,
    asked: SetStrengthOverride,
) -> Decision:
    lever = next((one for one in levers if one.strategy == asked.strategy), None)
    if lever is None:
        raise BadRequest(
            f"strategy: '{asked.strategy}' is no strategy that this job can turn.",
            "strategy",
            "unknown_lever",
        )
    if asked.strength > lever.cap:
        raise BadRequest(
            f"strength: the cap of '{asked.strategy}' is {number_text(lever.cap)}.",
            "strength",
            "above_cap",
        )
    old = state.strengths[asked.strategy]
    if asked.strength == old:
        raise Conflict(
            f"strength: '{asked.strategy}' is at {number_text(old)} already.",
            "strength",
            "nothing_to_change",
        )
    action = Action.RAISE_STRENGTH if asked.strength > old else Action.LOWER_STRENGTH
    changed = with_strength(state, asked.strategy, asked.strength)
    return Decision(
        action=action,
        reason=(
            f"Ordered: {asked.reason} ({asked.strategy} strength {number_text(old)} ->"
            f" {number_text(asked.strength)})"
        ),
        code="override_set_strength",
        state=_settled(policy, changed),
        lever=asked.strategy,
    )


def _keep(policy: Policy, state: ControllerState, evidence: OverrideEvidence) -> Decision:
    before = ControllerState.model_validate(evidence.before)
    after = ControllerState.model_validate(evidence.after)
    if evidence.action in {Action.ROLL_BACK, Action.STOP, Action.REPAIR}:
        raise Conflict(
            f"action: a {evidence.action} that was carried out can't be undone.",
            "action",
            "cannot_be_undone",
        )
    if _turned(before) == _turned(after):
        raise Conflict(
            "action: the decision changed no coefficient.", "action", "nothing_to_change"
        )
    if _turned(state) != _turned(after):
        raise Conflict(
            "action: the coefficients have been changed again since that decision.",
            "action",
            "changed_since",
        )
    restored = state.model_copy(
        update={
            "strengths": before.strengths,
            "learning_rate_scale": before.learning_rate_scale,
            "learning_rate_lowered": before.learning_rate_lowered,
            "raises_in_a_row": before.raises_in_a_row,
            "excess_before_raise": before.excess_before_raise,
        }
    )
    return Decision(
        action=Action.KEEP,
        reason=f"Ordered: {evidence.asked.reason} ({evidence.action} undone)",
        code="override_keep_training",
        state=_settled(policy, restored),
    )


def _roll_back(
    policy: Policy, state: ControllerState, look: Look, asked: RollBackOverride
) -> Decision:
    param = "step" if asked.checkpoint is None else "checkpoint"
    target = _find(look.checkpoints, asked)
    if target is None:
        raise Conflict(
            f"{param}: no saved state that can be gone back to is named so.",
            param,
            "no_such_target",
        )
    kept = [
        fact.valid_loss
        for fact in look.checkpoints
        if 0 < fact.step <= target.step and fact.valid_loss is not None
    ]
    moved = _settled(policy, state).model_copy(
        update={
            "branch": look.branch + 1,
            "raises_in_a_row": 0,
            "excess_before_raise": None,
            "repaired": False,
            "best_valid_loss": min(kept, default=None),
            "best_scores": tuple(best for best in state.best_scores if best[0] <= target.step),
        }
    )
    return Decision(
        action=Action.ROLL_BACK,
        reason=f"Ordered: {asked.reason} (back to step {target.step}, coefficients kept)",
        code="override_roll_back",
        state=moved,
        target_checkpoint_id=target.checkpoint_id,
        details={"target_step": target.step, "target_status": target.status},
    )


def _find(facts: Sequence[CheckpointFact], asked: RollBackOverride) -> CheckpointFact | None:
    """The newest of the states that the order names."""
    named = [
        fact
        for fact in facts
        if (fact.step == asked.step if asked.checkpoint is None else False)
        or fact.checkpoint_id == asked.checkpoint
    ]
    return max(named, key=lambda fact: fact.branch, default=None)


def _turned(state: ControllerState) -> tuple[dict[str, float], float]:
    return state.strengths, state.learning_rate_scale


def _settled(policy: Policy, state: ControllerState) -> ControllerState:
    """After a change patience counts anew, and lowering waits, as after the controller's own."""
    return counted_anew(state).model_copy(update={"cool_down": policy.ladder.cool_down_evals})
