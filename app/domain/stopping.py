"""Early stopping: what counts as an improvement of the watched metric, and what a rollback leaves of it."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from app.domain.benchmarks import Scorer, Scores
from app.domain.decisions import CheckpointFact, ControllerState, Look, MetricFact
from app.domain.policy import VALID_LOSS, Policy
from app.domain.wording import number_text

EARLY_STOPPING: Final = "early_stopping"  # the code of its decisions


def find_metric(policy: Policy, references: Sequence[str]) -> tuple[str, ...]:
    """Which of these benchmarks (`name@3`) early stopping watches: the one of that version, else all of the name."""
    metric = policy.early_stopping.metric
    if metric == VALID_LOSS:
        return ()
    if metric in references:
        return (metric,)
    return tuple(found for found in references if found.partition("@")[0] == metric)


def read_metric(
    name: str, scorer: Scorer, values: Scores, tokens: Scores | None
) -> MetricFact | None:
    """The mean score over the items that were scored (not NaN), of `nll` in nats per token.

    None where there is none, or where an item gave no finite number: a mean over the rest would flatter.
    """
    scored = ~np.isnan(values)
    found = values[scored].astype(np.float64)
    if not found.size or not np.isfinite(found).all():
        return None
    if scorer is not Scorer.NLL:
        return MetricFact(name=name, value=float(found.mean()), higher_is_better=True)
    counts = np.zeros(0) if tokens is None else tokens[scored].astype(np.float64)
    total = float(counts.sum())
    if not np.isfinite(total) or total <= 0:
        return None
    return MetricFact(name=name, value=float(found.sum()) / total, higher_is_better=False)


def count_improvement(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    """The counter after this evaluation; an evaluation without the metric doesn't count."""
    if policy.early_stopping.metric == VALID_LOSS:
        return _count_loss(policy, state, look)
    return _count_score(policy, state, look)


def is_exhausted(policy: Policy, state: ControllerState) -> bool:
    """Whether the patience is used up; in a dry run, which trains on, only until that has been proposed."""
    stopping = policy.early_stopping
    if not stopping.enabled or (policy.dry_run and state.stop_proposed):
        return False
    return state.evals_without_improvement >= stopping.patience


def describe_exhaustion(policy: Policy, state: ControllerState) -> str:
    """Why training stops, or in a dry run would, with the numbers."""
    metric = policy.early_stopping.metric
    best = state.best_valid_loss if metric == VALID_LOSS else _best_score(state)
    name = "Validation cross-entropy" if metric == VALID_LOSS else metric
    proposal = " A dry run: training goes on, and this is proposed once." if policy.dry_run else ""
    return (
        f"{name} has not improved on {number_text(best)}"
        f" for {state.evals_without_improvement} evaluations.{proposal}"
    )


def counted_anew(state: ControllerState) -> ControllerState:
    """The state with all patience left, after something that makes the objective another."""
    return state.model_copy(update={"evals_without_improvement": 0, "stop_proposed": False})


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
        return counted_anew(state).model_copy(update={"best_valid_loss": loss})
    return _wait(policy, state)


def _count_score(policy: Policy, state: ControllerState, look: Look) -> ControllerState:
    metric = look.metric
    if metric is None:
        return state
    best = _best_score(state)
    sign = 1.0 if metric.higher_is_better else -1.0
    if best is None or sign * (metric.value - best) > policy.early_stopping.min_delta:
        bests = (*state.best_scores, (look.step, metric.value))
        return counted_anew(state).model_copy(update={"best_scores": bests})
    return _wait(policy, state)


def _wait(policy: Policy, state: ControllerState) -> ControllerState:
    if state.evals <= policy.early_stopping.warmup_evals:
        return state
    waited = state.evals_without_improvement + 1
    return state.model_copy(update={"evals_without_improvement": waited})


def _best_score(state: ControllerState) -> float | None:
    return state.best_scores[-1][1] if state.best_scores else None
