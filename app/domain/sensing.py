"""The sensor: from per-item scores and a policy to a verdict with its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.domain.benchmarks import Scorer
from app.domain.decisions import BenchmarkReading, Reading, Verdict
from app.domain.policy import Policy
from app.domain.statistics import (
    DropEstimate,
    GroupMoments,
    HolmResult,
    PairedGroup,
    alpha_spent,
    holm,
    is_above_chance,
    lower_bound,
    mcnemar_p,
    p_above,
    paired_moments,
    paired_nll_increase,
    relative_drop,
    unpaired_moments,
    unpaired_nll_increase,
    upper_bound,
)

Floats = NDArray[np.floating]

MIN_ITEMS = 2  # fewer have no variance
REPORT_ALPHA = 0.05  # of the one look at the report set, each side
SEVERE_FACTOR = 2.0  # a lower bound above this many limits goes straight to a rollback
HOLD_MARGIN = 2.83  # standard errors: 1.645 + 0.84 * sqrt(2), see `holds`


@dataclass(frozen=True, slots=True)
class Summary:
    """A result that came without items: its value, standard error and number of items."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class SensedBenchmark:
    """One general benchmark of one look.

    `baseline` and `current` are aligned and hold only items that were to be scored: a NaN in `baseline`
    drops the item, anything not finite in `current` says that the model broke. For `nll` they are nats
    summed over the document and `baseline_tokens` its token counts (`current_tokens`, where given, must
    agree: the texts are the same). Without items `current` is None and `summary` says what is known.
    """

    name: str
    benchmark_version_id: str
    scorer: Scorer
    weight: float
    max_drop: float | None
    baseline: Floats
    current: Floats | None
    baseline_tokens: Floats | None = None
    current_tokens: Floats | None = None
    summary: Summary | None = None
    chance: float = 0.0

    @property
    def is_paired(self) -> bool:
        """Whether the result came with items."""
        return self.current is not None or self.summary is None


@dataclass(frozen=True, slots=True)
class _Measured:
    """A benchmark after its own arithmetic: `estimate` is None where nothing can be said."""

    source: SensedBenchmark
    n_items: int
    baseline: float | None = None
    value: float | None = None
    estimate: DropEstimate | None = None
    moments: GroupMoments | None = None
    mcnemar: float | None = None
    is_at_floor: bool = False
    is_broken: bool = False


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """H0: the drop behind `estimate` is at most `limit`; `name` is None for the mean."""

    name: str | None
    estimate: DropEstimate
    limit: float


def read_sensor(
    policy: Policy,
    benchmarks: Sequence[SensedBenchmark],
    *,
    look: int,
    alpha: float | None = None,
) -> Reading:
    """One look of the sensor.

    `regress` when Holm's procedure at `alpha` rejects "within the limit" for the mean, an NLL limit or a
    benchmark's own limit, or when a score is not finite; `pass` when every watched benchmark was measured
    and the 95 % upper bounds of the mean and of every NLL are within their limits; `at_floor` or `no_data`
    when there is nothing to test; else `inconclusive`.

    Args:
        policy: Limits of the job.
        benchmarks: The general benchmarks that are watched.
        look: Number of this evaluation point in the job, from 1.
        alpha: Error of the harmful side; None spends the schedule's share for `look`.
    """
    level = alpha_spent(look) if alpha is None else alpha
    measured = [_measure(benchmark) for benchmark in benchmarks]
    mean = _mean(measured)
    hypotheses = _hypotheses(policy, measured, mean)
    results = holm([p_above(h.estimate, h.limit) for h in hypotheses], level)
    by_name = {h.name: (h, result) for h, result in zip(hypotheses, results, strict=True)}
    is_broken = any(m.is_broken for m in measured)
    is_severe = is_broken or any(
        result.rejected and lower_bound(h.estimate, result.alpha) > SEVERE_FACTOR * h.limit
        for h, result in by_name.values()
    )
    mean_result = by_name.get(None)
    mean_alpha = level if mean_result is None else mean_result[1].alpha
    return Reading(
        look=look,
        alpha=level,
        drop=None if mean is None else mean.drop,
        stderr=None if mean is None else mean.stderr,
        lower=None if mean is None else lower_bound(mean, mean_alpha),
        upper=None if mean is None else upper_bound(mean),
        limit=policy.max_drop,
        p_regress=None if mean is None else p_above(mean, policy.max_drop),
        verdict=_verdict(policy, measured, mean, [result for _, result in by_name.values()]),
        severe=is_severe,
        not_finite=is_broken,
        benchmarks=tuple(_describe(policy, m, by_name.get(m.source.name), level) for m in measured),
    )


def read_report(policy: Policy, benchmarks: Sequence[SensedBenchmark]) -> Reading:
    """The final test on the report set: one look, 5 % each side."""
    return read_sensor(policy, benchmarks, look=1, alpha=REPORT_ALPHA)


def holds(policy: Policy, benchmarks: Sequence[SensedBenchmark]) -> bool:
    """Whether a point of the line from base to tuned holds, judged on gate items; for repair and WiSE-FT searches.

    Rule: each limited estimate (the mean, every NLL, own limits) is at most
    `limit - min(2.83 stderr, limit / 2)`. With 2.83 = 1.645 + 0.84 * sqrt(2) a fresh set of as many items
    then passes the report test with about 80 %; the floor at half the limit keeps a small gate set, which
    could never show a pass, from sending every search back to the base. Nothing measured holds nothing.
    """
    measured = [_measure(benchmark) for benchmark in benchmarks]
    if any(m.is_broken for m in measured):
        return False
    hypotheses = _hypotheses(policy, measured, _mean(measured))
    return bool(hypotheses) and all(
        h.estimate.drop <= h.limit - min(HOLD_MARGIN * h.estimate.stderr, h.limit / 2)
        for h in hypotheses
    )


def _measure(benchmark: SensedBenchmark) -> _Measured:
    usable = np.isfinite(benchmark.baseline)
    if benchmark.baseline_tokens is not None:
        usable &= benchmark.baseline_tokens > 0
    baseline = benchmark.baseline[usable]
    if benchmark.scorer is Scorer.NLL:
        return _measure_nll(benchmark, usable)
    if baseline.size >= MIN_ITEMS and not is_above_chance(baseline, benchmark.chance):
        return _Measured(
            benchmark, n_items=int(baseline.size), baseline=_mean_of(baseline), is_at_floor=True
        )
    if benchmark.current is None:
        return _measure_summary(benchmark, baseline)
    value = benchmark.current[usable]
    if not np.isfinite(value).all():
        return _broken(benchmark, baseline)
    if value.size < MIN_ITEMS:
        return _Measured(benchmark, n_items=int(value.size))
    moments = paired_moments(PairedGroup(benchmark.weight, baseline, value))
    return _Measured(
        benchmark,
        n_items=int(value.size),
        baseline=moments.baseline,
        value=moments.value,
        estimate=relative_drop([moments]),
        moments=moments,
        mcnemar=mcnemar_p(baseline, value) if _is_binary(baseline, value) else None,
    )


def _is_binary(*scores: Floats) -> bool:
    """Whether every item is right or wrong: of shares McNemar's test would count whichever side of a half they are."""
    return all(bool(((each == 0) | (each == 1)).all()) for each in scores)


def _measure_summary(benchmark: SensedBenchmark, baseline: Floats) -> _Measured:
    summary = benchmark.summary
    if summary is None or min(summary.n, baseline.size) < MIN_ITEMS:
        return _Measured(benchmark, n_items=0 if summary is None else summary.n)
    if not math.isfinite(summary.value):
        return _broken(benchmark, baseline)
    moments = unpaired_moments(benchmark.weight, baseline, summary.value, summary.stderr, summary.n)
    return _Measured(
        benchmark,
        n_items=summary.n,
        baseline=moments.baseline,
        value=summary.value,
        estimate=relative_drop([moments]),
        moments=moments,
    )


def _measure_nll(benchmark: SensedBenchmark, usable: NDArray[np.bool_]) -> _Measured:
    if benchmark.baseline_tokens is None:
        return _Measured(benchmark, n_items=0)
    baseline, tokens = benchmark.baseline[usable], benchmark.baseline_tokens[usable]
    n = int(baseline.size)
    if n < MIN_ITEMS:
        return _Measured(benchmark, n_items=n)
    total = float(np.sum(tokens, dtype=np.float64))
    before = float(np.sum(baseline, dtype=np.float64)) / total
    if benchmark.current is not None:
        value = benchmark.current[usable]
        if not np.isfinite(value).all():
            return _broken(benchmark, baseline)
        estimate = paired_nll_increase(baseline, value, tokens)
    elif (
        benchmark.summary is None
        or benchmark.summary.stderr is None
        or benchmark.summary.n < MIN_ITEMS
    ):
        return _Measured(benchmark, n_items=0, baseline=before)  # its spread is unknown
    else:
        summary = benchmark.summary
        if not math.isfinite(summary.value):
            return _broken(benchmark, baseline)
        n = summary.n
        estimate = unpaired_nll_increase(
            baseline, tokens, summary.value, benchmark.summary.stderr, summary.n
        )
    return _Measured(
        benchmark, n_items=n, baseline=before, value=before + estimate.drop, estimate=estimate
    )


def _broken(benchmark: SensedBenchmark, baseline: Floats) -> _Measured:
    return _Measured(benchmark, n_items=int(baseline.size), is_broken=True)


def _mean_of(scores: Floats) -> float:
    return float(np.mean(scores, dtype=np.float64))


def _mean(measured: Sequence[_Measured]) -> DropEstimate | None:
    """Relative drop of the weighted mean of the accuracy benchmarks that could be measured."""
    moments = [m.moments for m in measured if m.moments is not None]
    return relative_drop(moments) if moments else None


def _hypotheses(
    policy: Policy, measured: Sequence[_Measured], mean: DropEstimate | None
) -> list[_Hypothesis]:
    hypotheses = [] if mean is None else [_Hypothesis(None, mean, policy.max_drop)]
    for m in measured:
        limit = _limit(policy, m.source)
        if m.estimate is not None and limit is not None:
            hypotheses.append(_Hypothesis(m.source.name, m.estimate, limit))
    return hypotheses


def _limit(policy: Policy, benchmark: SensedBenchmark) -> float | None:
    """The benchmark's own limit; an NLL benchmark always has one, in nats per token."""
    return policy.max_nll_increase if benchmark.scorer is Scorer.NLL else benchmark.max_drop


def _verdict(
    policy: Policy,
    measured: Sequence[_Measured],
    mean: DropEstimate | None,
    results: Sequence[HolmResult],
) -> Verdict:
    if any(result.rejected for result in results) or any(m.is_broken for m in measured):
        return Verdict.REGRESS
    if not results:
        at_floor = bool(measured) and all(m.is_at_floor for m in measured)
        return Verdict.AT_FLOOR if at_floor else Verdict.NO_DATA
    uppers = [] if mean is None else [upper_bound(mean) <= policy.max_drop]
    for m in measured:
        if m.estimate is None:
            uppers.append(m.is_at_floor)  # a watched benchmark without scores forbids a pass
        elif m.source.scorer is Scorer.NLL:
            uppers.append(upper_bound(m.estimate) <= policy.max_nll_increase)
    return Verdict.PASS if all(uppers) else Verdict.INCONCLUSIVE


def _describe(
    policy: Policy,
    measured: _Measured,
    tested: tuple[_Hypothesis, HolmResult] | None,
    alpha: float,
) -> BenchmarkReading:
    source, estimate = measured.source, measured.estimate
    result = HolmResult(rejected=False, alpha=alpha) if tested is None else tested[1]
    limit = _limit(policy, source)
    return BenchmarkReading(
        name=source.name,
        benchmark_version_id=source.benchmark_version_id,
        scorer=source.scorer,
        weight=source.weight,
        n_items=measured.n_items,
        paired=source.is_paired,
        baseline=measured.baseline,
        value=measured.value,
        drop=None if estimate is None else estimate.drop,
        lower=None if estimate is None else lower_bound(estimate, result.alpha),
        upper=None if estimate is None else upper_bound(estimate),
        limit=limit,
        p_regress=None if estimate is None or limit is None else p_above(estimate, limit),
        verdict=_own_verdict(measured, result, policy.max_drop if limit is None else limit),
        stderr=None if estimate is None else estimate.stderr,
        mcnemar_p=measured.mcnemar,
    )


def _own_verdict(measured: _Measured, result: HolmResult, limit: float) -> Verdict:
    """Of one benchmark; without a limit of its own it is held against the mean's and can't regress alone."""
    if measured.is_at_floor:
        return Verdict.AT_FLOOR
    if measured.is_broken or result.rejected:
        return Verdict.REGRESS
    if measured.estimate is None:
        return Verdict.NO_DATA
    return Verdict.PASS if upper_bound(measured.estimate) <= limit else Verdict.INCONCLUSIVE
