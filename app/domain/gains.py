"""Benchmarks that must rise: the gain over the baseline, paired by item, and whether it was shown."""

import math
from collections.abc import Sequence

import numpy as np

from app.domain.benchmarks import Scorer
from app.domain.decisions import GainReading
from app.domain.policy import Policy
from app.domain.sensing import MIN_ITEMS, SensedBenchmark
from app.domain.statistics import (
    DropEstimate,
    PairedGroup,
    paired_moments,
    paired_nll_increase,
    upper_bound,
)


def read_gains(policy: Policy, sensed: Sequence[SensedBenchmark]) -> tuple[GainReading, ...]:
    """What came of each benchmark that the policy expects to rise.

    A gain is the rise of the mean score, of `nll` the fall in nats per token; it is shown when its one-sided
    95 % lower bound is above `min_gain`. What was not measured, or not finite, has not risen.
    """
    wanted = {
        watched.name: watched.min_gain or 0.0
        for watched in policy.benchmarks or ()
        if watched.expect == "rise"
    }
    return tuple(_read(found, wanted[found.name]) for found in sensed if found.name in wanted)


def _read(sensed: SensedBenchmark, min_gain: float) -> GainReading:
    usable = np.isfinite(sensed.baseline)
    if sensed.baseline_tokens is not None:
        usable &= sensed.baseline_tokens > 0
    baseline = sensed.baseline[usable]
    value = None if sensed.current is None else sensed.current[usable]
    n_items = int(baseline.size)
    if value is None or n_items < MIN_ITEMS or not np.isfinite(value).all():
        return GainReading(name=sensed.name, n_items=n_items, min_gain=min_gain, has_risen=False)
    if sensed.scorer is Scorer.NLL:
        if sensed.baseline_tokens is None:
            return GainReading(
                name=sensed.name, n_items=n_items, min_gain=min_gain, has_risen=False
            )
        tokens = sensed.baseline_tokens[usable]
        total = float(np.sum(tokens, dtype=np.float64))
        before = float(np.sum(baseline, dtype=np.float64)) / total
        loss = paired_nll_increase(baseline, value, tokens)
        after = before + loss.drop
    else:
        moments = paired_moments(PairedGroup(1.0, baseline, value))
        before, after = moments.baseline, moments.value
        variance = moments.value_variance + moments.baseline_variance - 2 * moments.covariance
        loss = DropEstimate(before - after, math.sqrt(max(variance, 0.0)), moments.dof)
    lower = -upper_bound(loss)
    return GainReading(
        name=sensed.name,
        n_items=n_items,
        baseline=before,
        value=after,
        gain=-loss.drop,
        lower=lower,
        min_gain=min_gain,
        has_risen=lower > min_gain,
    )
