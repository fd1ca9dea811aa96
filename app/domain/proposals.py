"""What is carried out of a decision: all of it, or of a mere proposal nothing."""

from app.domain.decisions import Action, ControllerState, Decision, Look
from app.domain.policy import Policy
from app.domain.staging import cross_stages


def mark_proposal(policy: Policy, decision: Decision) -> Decision:
    """Under a `dry_run` policy whatever would change something is proposed."""
    if not policy.dry_run or decision.action is Action.KEEP:
        return decision
    return decision.model_copy(update={"is_proposal": True})


def carried_out(decision: Decision, before: ControllerState, look: Look) -> Decision:
    """The decision itself; of a proposal `keep`, with the coefficients as they were.

    Evaluations are counted on, and a stage that begins here begins with its own strengths, as ever.
    """
    if not decision.is_proposal:
        return decision
    kept = Decision(
        action=Action.KEEP,
        reason=f"Proposed only: {decision.reason}",
        code="proposed",
        state=before.model_copy(update={"evals": decision.state.evals, "branch": look.branch}),
    )
    return cross_stages(kept, look)
