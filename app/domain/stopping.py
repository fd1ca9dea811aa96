"""Early stopping: what counts as an improvement of the watched metric, and what a rollback leaves of it."""

from app.domain.decisions import CheckpointFact, ControllerState, Look
from app.domain.policy import VALID_LOSS, Policy
from app.domain.wording import number_text


def count_improvement(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    """The counter after this evaluation; an evaluation without the metric doesn't count."""
    if policy.early_stopping.metric == VALID_LOSS:
        return _count_loss(policy, state, look)
    return _count_score(policy, state, look)


def is_exhausted(policy: Policy, state: ControllerState) -> bool:
    """Whether the patience is used up."""
    stopping = policy.early_stopping
    return stopping.enabled and state.evals_without_improvement >= stopping.patience


def describe_exhaustion(policy: Policy, state: ControllerState) -> str:
    """Why training stops, with the numbers."""
    metric = policy.early_stopping.metric
    best = state.best_valid_loss if metric == VALID_LOSS else _best_score(state)
    name = "Validation cross-entropy" if metric == VALID_LOSS else metric
    return (
        f"{name} has not improved on {number_text(best)}"
        f" for {state.evals_without_improvement} evaluations."
    )


def rewind_metric(
    state: ControllerState, checkpoints: tuple[CheckpointFact, ...], step: int
) -> ControllerState:
    """The best over what stays valid when training goes back to `step`."""
    kept = [
        fact.valid_loss
        for fact in checkpoints
        if fact.status != "bad" and 0 < fact.step <= step and fact.valid_loss is not None
    ]
    return state.model_copy(
        update={
            "best_valid_loss": min(kept, default=None),
            "best_scores": tuple(best for best in state.best_scores if best[0] <= step),
        }
    )


def _count_loss(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    loss, best = look.valid_loss, state.best_valid_loss
    if loss is None:
        return state
    if best is None or loss < best - policy.early_stopping.min_delta:
        return state.model_copy(update={"best_valid_loss": loss, "evals_without_improvement": 0})
    return _wait(policy, state)


def _count_score(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    metric = look.metric
    if metric is None:
        return state
    best = _best_score(state)
    sign = 1.0 if metric.higher_is_better else -1.0
    if best is None or sign * (metric.value - best) > policy.early_stopping.min_delta:
        bests = (*state.best_scores, (look.step, metric.value))
        return state.model_copy(update={"best_scores": bests, "evals_without_improvement": 0})
    return _wait(policy, state)


def _wait(policy: Policy, state: ControllerState) -> ControllerState:
    if state.evals <= policy.early_stopping.warmup_evals:
        return state
    waited = state.evals_without_improvement + 1
    return state.model_copy(update={"evals_without_improvement": waited})


def _best_score(state: ControllerState) -> float | None:
    return state.best_scores[-1][1] if state.best_scores else None
