"""What is carried out of a decision: all of it, or of a mere proposal nothing."""

from app.domain.decisions import Action, ControllerState, Decision, Look
from app.domain.dual import observe
from app.domain.policy import Policy
from app.domain.staging import cross_stages
from app.domain.stopping import EARLY_STOPPING, count_improvement


def mark_proposal(policy: Policy, decision: Decision) -> Decision:
    """Under a `dry_run` policy whatever would change something is proposed."""
    if not policy.dry_run or decision.action is Action.KEEP:
        return decision
    return decision.model_copy(update={"is_proposal": True})


def carried_out(
    policy: Policy, decision: Decision, before: ControllerState, look: Look
) -> Decision:
    """The decision itself; of a proposal `keep`, with the coefficients as they were.

    What was seen is kept all the same: training goes on as it was, so a look counts for early stopping and for
    the smoothed error of `dual` whatever was proposed on it. A stage that begins here begins with its own
    strengths, as ever.
    """
    if not decision.is_proposal:
        return decision
    state = before.model_copy(update={"evals": decision.state.evals, "branch": look.branch})
    if look.is_finite:
        state = count_improvement(policy, state, look)
        if policy.controller == "dual":
            state = observe(policy.dual, state, look.reading)
    if decision.code == EARLY_STOPPING:
        state = state.model_copy(update={"stop_proposed": True})
    kept = Decision(
        action=Action.KEEP,
        reason=f"Proposed only: {decision.reason}",
        code="proposed",
        state=state,
    )
    return cross_stages(kept, look)
