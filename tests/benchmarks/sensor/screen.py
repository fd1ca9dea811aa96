"""Which looks may be called `regress`: p-values by counts, for millions of looks that the sensor need not read."""

import numpy as np
from numpy.typing import NDArray
from scipy import special

from app.domain.policy import Policy
from app.domain.statistics import UPPER_LEVEL
from tests.benchmarks.sensor.simulation import CHANCE, TOKENS, Counts, Floats, Looked, Suite

FAR = (
    -0.5
)  # (limit - drop) / stderr; what lies above has a p-value over 0.3, far from any alpha, and gets 1


def smallest_p(policy: Policy, suite: Suite, looked: Looked) -> Floats:
    """Of each job the smallest p-value of "within the limit", times the number of limits tested.

    At most the look's alpha where the sensor calls it `regress`; a job that leaves nothing to test, or whose
    drops are all far from their limits, gets 1 or more. It
    decides nothing: the run lets the sensor read every look that comes near, and a sample of the others.
    """
    n = float(looked.n)
    right, lost, won = looked.right_JB, looked.lost_JB, looked.won_JB
    watched_JB = _above_chance(right, n)
    now = right - lost + won
    parts_JB, ratio_J = _mean_parts(right, now, right - lost, watched_JB, n)
    has_mean_J = np.asarray(watched_JB.any(axis=1))
    p_values = [_p_above(1.0 - ratio_J[:, None], parts_JB, policy.max_drop, n, has_mean_J)]
    tested_J = has_mean_J.astype(np.int64)
    if suite.has_own_limits:
        for place in range(right.shape[1]):
            one = slice(place, place + 1)
            is_watched_J = watched_JB[:, place]
            parts, ratio = _mean_parts(
                right[:, one], now[:, one], (right - lost)[:, one], watched_JB[:, one], n
            )
            p_values.append(_p_above(1.0 - ratio[:, None], parts, policy.max_drop, n, is_watched_J))
            tested_J = tested_J + is_watched_J
    for place in range(suite.n_texts):
        residuals = (n - 1) * (looked.spread_JT[:, place] * TOKENS) ** 2 + 2.0
        stderr = np.sqrt(n / (n - 1) * residuals) / (n * TOKENS)
        excess = policy.max_nll_increase - looked.rise_JT[:, place]
        p_values.append(_p_value(np.full(excess.shape, n - 1), excess / stderr))
        tested_J = tested_J + 1
    return np.asarray(np.min(p_values, axis=0) * np.maximum(tested_J, 1))


def _mean_parts(
    right: Counts, now: Counts, both: Counts, watched: NDArray[np.bool_], n: float
) -> tuple[Floats, Floats]:
    """Each benchmark's part of the variance of the ratio of the means, and that ratio; weights are equal."""
    total, scale = n + 2.0, (n + 1.0) * n
    padded_right, padded_now = right + 1.0, now + 1.0
    var_b = (padded_right - padded_right**2 / total) / scale
    var_v = (padded_now - padded_now**2 / total) / scale
    cov = (both - padded_right * padded_now / total) / scale
    baseline = (right * watched).sum(axis=1) / n
    baseline = np.where(baseline > 0, baseline, 1.0)  # nothing watched: no reading, and no division
    ratio = (now * watched).sum(axis=1) / n / baseline
    spread = np.maximum(var_v - 2 * ratio[:, None] * cov + ratio[:, None] ** 2 * var_b, 0.0)
    return spread * watched / baseline[:, None] ** 2, ratio


def _p_above(
    drop_J1: Floats, parts: Floats, limit: float, n: float, is_tested: NDArray[np.bool_]
) -> Floats:
    variance = np.where(is_tested, parts.sum(axis=1), 1.0)
    spread = np.where(is_tested, (parts**2).sum(axis=1) / (n - 1), 1.0)
    p = _p_value(variance**2 / spread, (limit - drop_J1[:, 0]) / np.sqrt(variance))
    return np.where(is_tested, p, 1.0)


def _p_value(dof: Floats, statistic: Floats) -> Floats:
    p = np.ones(statistic.shape)
    is_near = statistic < FAR
    p[is_near] = special.stdtr(dof[is_near], statistic[is_near])
    return p


def _above_chance(right: Counts, n: float) -> NDArray[np.bool_]:
    total, padded = n + 2.0, right + 1.0
    stderr = np.sqrt((padded - padded**2 / total) / (n + 1.0) / n)
    return np.asarray(right / n + special.stdtrit(n - 1, UPPER_LEVEL) * stderr > CHANCE)
