"""Closed-form intervals and tests for drops against a baseline, and how error is spent over looks and hypotheses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

ALPHA_TOTAL = 0.01  # all looks of a job together
UPPER_LEVEL = 0.05  # one-sided, of every upper bound


@dataclass(frozen=True, slots=True)
class PairedGroup:
    """Scores of one benchmark's items by the baseline and by the subject, in the same item order."""

    weight: float
    baseline: Floats
    value: Floats


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """One benchmark's two means and the covariance matrix of the pair of means."""

    weight: float
    baseline: float
    value: float
    baseline_variance: float
    value_variance: float
    covariance: float
    dof: float


@dataclass(frozen=True, slots=True)
class DropEstimate:
    """A drop (relative) or a rise in nats per token, with its standard error and degrees of freedom."""

    drop: float
    stderr: float
    dof: float

    def lower(self, alpha: float) -> float:
        """One-sided lower confidence bound at level `alpha`."""
        return lower_bound(self, alpha)

    def upper(self, alpha: float = UPPER_LEVEL) -> float:
        """One-sided upper confidence bound at level `alpha`."""
        return upper_bound(self, alpha)


@dataclass(frozen=True, slots=True)
class HolmResult:
    """What Holm's procedure says of one hypothesis: `p <= alpha` exactly when it is rejected."""

    rejected: bool
    alpha: float


def paired_moments(group: PairedGroup) -> GroupMoments:
    """Moments of one benchmark scored twice on the same items.

    The covariance is that of the items plus two pseudo-items, one flipped each way, over the number of
    real items: so it is never zero, also when no item changed.

    Args:
        group: At least two items, every score finite.
    """
    n = group.baseline.shape[0]
    baseline = np.append(group.baseline.astype(np.float64), (1.0, 0.0))
    value = np.append(group.value.astype(np.float64), (0.0, 1.0))
    covariance = np.cov(baseline, value, ddof=1) / n
    return GroupMoments(
        weight=group.weight,
        baseline=float(np.mean(group.baseline, dtype=np.float64)),
        value=float(np.mean(group.value, dtype=np.float64)),
        baseline_variance=float(covariance[0, 0]),
        value_variance=float(covariance[1, 1]),
        covariance=float(covariance[0, 1]),
        dof=float(n - 1),
    )


def unpaired_moments(
    weight: float, baseline: Floats, value: float, stderr: float | None, n: int
) -> GroupMoments:
    """Moments of one benchmark whose new value came without items.

    Args:
        weight: Of the benchmark in the mean.
        baseline: The baseline's per-item scores, at least two, finite.
        value: The new mean.
        stderr: Its standard error; None takes the binomial one.
        n: Number of items behind `value`, at least two.
    """
    n_baseline = baseline.shape[0]
    scores = np.append(baseline.astype(np.float64), (0.0, 1.0))
    binomial = max(value * (1.0 - value), 0.0) / n
    pseudo = (value**2 + (1.0 - value) ** 2) / (n * (n + 1))  # one pseudo-item right, one wrong
    return GroupMoments(
        weight=weight,
        baseline=float(np.mean(baseline, dtype=np.float64)),
        value=value,
        baseline_variance=float(np.var(scores, ddof=1)) / n_baseline,
        value_variance=(binomial if stderr is None else stderr**2) + pseudo,
        covariance=0.0,
        dof=float(min(n, n_baseline) - 1),
    )


def relative_drop(groups: Sequence[GroupMoments]) -> DropEstimate:
    """Relative drop 1 - V/B of the weighted mean of benchmark means, B the baseline's and V the subject's.

    Delta method: var(V/B) = sum_g w_g^2 var(v_g - R b_g) / B^2 with R = V/B and weights that sum to 1;
    degrees of freedom by Welch and Satterthwaite over the benchmarks.

    Raises:
        ValueError: No group, or the baseline's mean is not above zero.
    """
    total = sum(group.weight for group in groups)
    baseline = sum(group.weight * group.baseline for group in groups)
    if not groups or baseline <= 0:
        raise ValueError("a relative drop needs a baseline above zero")
    baseline /= total
    ratio = sum(group.weight * group.value for group in groups) / total / baseline
    parts = [
        (group.weight / total) ** 2
        * max(
            group.value_variance
            - 2 * ratio * group.covariance
            + ratio**2 * group.baseline_variance,
            0.0,
        )
        / baseline**2
        for group in groups
    ]
    variance = sum(parts)
    spread = sum(part**2 / max(group.dof, 1.0) for part, group in zip(parts, groups, strict=True))
    return DropEstimate(
        drop=1.0 - ratio,
        stderr=math.sqrt(variance),
        dof=variance**2 / spread if spread > 0 else 1.0,
    )


def paired_drop(groups: Sequence[PairedGroup]) -> DropEstimate:
    """Relative drop of the weighted mean of benchmarks, all of them paired item by item."""
    return relative_drop([paired_moments(group) for group in groups])


def paired_nll_increase(baseline: Floats, value: Floats, tokens: Floats) -> DropEstimate:
    """Rise of the negative log-likelihood in nats per token, paired by document (ratio estimator).

    As with accuracies no interval has width 0: two pseudo-documents moved by one nat each way.

    Args:
        baseline: Nats summed over each document's tokens, by the baseline; at least two documents.
        value: The same by the subject.
        tokens: Token counts of the documents.
    """
    n = baseline.shape[0]
    change = value.astype(np.float64) - baseline.astype(np.float64)
    total_tokens = float(np.sum(tokens, dtype=np.float64))
    increase = float(np.sum(change)) / total_tokens
    residuals = np.append(change - increase * tokens.astype(np.float64), (1.0, -1.0))
    variance = n / (n - 1) * float(np.sum(residuals**2)) / total_tokens**2
    return DropEstimate(drop=increase, stderr=math.sqrt(variance), dof=float(n - 1))


def unpaired_nll_increase(
    baseline: Floats, tokens: Floats, value: float, stderr: float, n: int
) -> DropEstimate:
    """Rise in nats per token where the new mean came without items.

    Args:
        baseline: Nats summed over each document's tokens, by the baseline; at least two documents.
        tokens: Token counts of the documents.
        value: New mean, nats per token.
        stderr: Its standard error.
        n: Number of documents behind `value`.
    """
    zero = np.zeros_like(baseline)
    own = paired_nll_increase(zero, baseline, tokens)
    return DropEstimate(
        drop=value - own.drop,
        stderr=math.hypot(stderr, own.stderr),
        dof=float(max(min(n, baseline.shape[0]) - 1, 1)),
    )


def lower_bound(estimate: DropEstimate, alpha: float) -> float:
    """One-sided lower confidence bound at level `alpha`, by the t quantile."""
    return estimate.drop + t_quantile(estimate.dof, alpha) * estimate.stderr


def upper_bound(estimate: DropEstimate, alpha: float = UPPER_LEVEL) -> float:
    """One-sided upper confidence bound at level `alpha`, by the t quantile."""
    return estimate.drop - t_quantile(estimate.dof, alpha) * estimate.stderr


def p_above(estimate: DropEstimate, limit: float) -> float:
    """One-sided p-value of H0 "the drop is at most `limit`"; small speaks for a larger drop."""
    return float(_special().stdtr(estimate.dof, (limit - estimate.drop) / estimate.stderr))


def alpha_spent(look: int) -> float:
    """Error that look `look` (from 1) may spend; sums to 0.01 over endlessly many looks (Basel series)."""
    return ALPHA_TOTAL * 6.0 / (math.pi**2 * look**2)


def holm(p_values: Sequence[float], alpha: float) -> tuple[HolmResult, ...]:
    """Holm's step-down procedure: family-wise error `alpha` whatever the dependence.

    Hypotheses left over when the procedure stops carry the level at which it stopped.
    """
    results = [HolmResult(rejected=False, alpha=alpha)] * len(p_values)
    rejecting = True
    level = alpha
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if rejecting:
            level = alpha / (len(p_values) - position)
            rejecting = p_values[index] <= level
        results[index] = HolmResult(rejected=rejecting, alpha=level)
    return tuple(results)


def mcnemar_p(baseline: Floats, value: Floats) -> float:
    """Exact two-sided McNemar p-value of "right equally often", from the discordant items; reported, never a gate."""
    lost = int(np.count_nonzero((baseline > 0.5) & (value <= 0.5)))
    won = int(np.count_nonzero((baseline <= 0.5) & (value > 0.5)))
    if lost + won == 0:
        return 1.0
    return min(1.0, 2.0 * float(_special().bdtr(min(lost, won), lost + won, 0.5)))


def is_above_chance(scores: Floats, chance: float) -> bool:
    """Whether the mean score is above `chance` at one-sided 5 %, the variance with one pseudo-item right and one wrong."""
    n = scores.shape[0]
    if n < 2:
        return False
    padded = np.append(scores.astype(np.float64), (0.0, 1.0))
    stderr = math.sqrt(float(np.var(padded, ddof=1)) / n)
    estimate = DropEstimate(drop=float(np.mean(scores, dtype=np.float64)), stderr=stderr, dof=n - 1)
    return lower_bound(estimate, UPPER_LEVEL) > chance


def t_quantile(dof: float, level: float) -> float:
    """Quantile of Student's t distribution."""
    return float(_special().stdtrit(dof, level))


def normal_cdf(value: float) -> float:
    """Of the standard normal distribution."""
    return float(_special().ndtr(value))


def _special() -> Any:  # noqa: ANN401 - scipy has no types here
    """scipy's distributions, loaded when a bound is first computed: 24 MB that most processes never need."""
    from scipy import special

    return special
