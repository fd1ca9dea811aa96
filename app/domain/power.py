"""What the sensor can see: its power for a policy, and how many items and evaluations the budget buys."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.domain.benchmarks import DEFAULT_GATE_ITEMS, Scorer
from app.domain.frozen import Frozen
from app.domain.policy import Policy
from app.domain.statistics import (
    UPPER_LEVEL,
    DropEstimate,
    GroupMoments,
    alpha_spent,
    is_above_chance,
    normal_cdf,
    relative_drop,
    t_quantile,
)

Floats = NDArray[np.floating]

ASSUMED_ACCURACY = 0.5
ASSUMED_DISCORDANCE = 0.1  # share of items that an undamaged model answers otherwise than the base
ASSUMED_NLL_SPREAD = (
    0.1  # nats per token, standard deviation over documents of an undamaged model's change
)
ASSUMED_NLL_TOKENS = 200.0  # a document
WANTED_POWER = 0.8
DETECTION_MARGIN = 0.02  # above a limit (2 points, 0.02 nats): such a drop is to be called
WANTED_DETECTION = 0.9
MAX_ITEMS = 10_000_000
EVALUATIONS_WISHED = 10  # a job, where the budget allows them
FEWEST_ITEMS = 50  # a benchmark; under this the interval says nothing


@dataclass(frozen=True, slots=True)
class PlannedBenchmark:
    """A watched general benchmark before training; `baseline` holds cached scores, NaN where not scored."""

    name: str
    scorer: Scorer
    weight: float
    max_drop: float | None
    n_items: int  # that the gate will hold
    baseline: Floats | None = None
    baseline_tokens: Floats | None = None
    chance: float = 0.0


class PowerEstimate(Frozen):
    """What can be seen of one benchmark, or of the mean; all None where it is at floor or has no items."""

    n_items: int  # a benchmark
    limit: float
    regress_at_80: float | None  # true drop that the first look calls regress with 80 %
    pass_at_zero: float | None  # chance that an undamaged model passes
    items_for_pass_80: int | None  # a benchmark, for `pass_at_zero` 0.8; None: out of reach
    items_for_regress_90: int | None = (
        None  # a benchmark: a drop of the limit + 2 points is called at the look with 90 %
    )
    at_floor: bool = False


class Recommendation(Frozen):
    """Gate items a benchmark that make the verdict worth its name, both ways; None where out of reach."""

    items: int | None  # the larger of the two
    binds: Literal["pass", "regress"]  # which of them it is
    look: int  # up to which damage that begins is called at once, as below; a later one spends less error
    items_for_pass: int | None  # an undamaged model passes, the mean and every NLL, with 80 %
    items_for_regress: (
        int | None
    )  # the mean, or an NLL, 2 points above its limit is called with 90 %


class Power(Frozen):
    """Power of the sensor for a job."""

    from_baseline: bool  # False: accuracy 0.5; the discordance is assumed (10 %) in both cases
    mean: PowerEstimate | None
    benchmarks: dict[str, PowerEstimate]
    recommended: Recommendation | None = None  # None: nothing that can be read


class EvaluationPlan(Frozen):
    """How often a run is evaluated and on how many gate items a benchmark."""

    eval_interval: int
    gate_items: int


@dataclass(frozen=True, slots=True)
class _Expected:
    """A benchmark's accuracy, or the size of its documents, as power is computed from it."""

    source: PlannedBenchmark
    accuracy: float
    tokens: float
    is_at_floor: bool


#: What is found for (true drop, items a benchmark); None stands for the items there are.
_Estimator = Callable[[float, int | None], DropEstimate]


def power(policy: Policy, benchmarks: Sequence[PlannedBenchmark], *, look: int = 1) -> Power:
    """Power of one look, per benchmark and for the mean of the accuracies.

    Harmful calls are taken at the look's alpha over the number of hypotheses (Holm's first step).

    Args:
        policy: Limits of the job.
        benchmarks: What is watched.
        look: The first one for what drops early; a later one spends less error, so it needs more items. What is
            recommended is for the tenth at least: so many evaluations a job is given where nobody says otherwise.
    """
    expected = [_expect(benchmark) for benchmark in benchmarks]
    accuracies = [e for e in expected if _counts(e) and e.source.scorer is not Scorer.NLL]
    limited = [
        e for e in expected if _counts(e) and (e.source.scorer is Scorer.NLL or e.source.max_drop)
    ]
    n_limits = max(bool(accuracies) + len(limited), 1)
    alpha = alpha_spent(look) / n_limits
    texts = [e for e in limited if e.source.scorer is Scorer.NLL]
    needed_by_all = [(_estimator(e), policy.max_nll_increase) for e in texts]
    mean = None
    if accuracies:
        n_items = min(e.source.n_items for e in accuracies)
        estimate = _mean_estimator(accuracies)
        mean = _estimate_power(estimate, policy.max_drop, alpha, n_items)
        needed_by_all.append((estimate, policy.max_drop))
    return Power(
        from_baseline=bool(benchmarks) and all(b.baseline is not None for b in benchmarks),
        mean=mean,
        benchmarks={e.source.name: _benchmark_power(policy, e, alpha) for e in expected},
        recommended=_recommend(needed_by_all, n_limits, max(look, EVALUATIONS_WISHED)),
    )


def plan_evaluations(
    seconds_per_step: float,
    seconds_per_item: Mapping[str, float],
    total_steps: int,
    policy: Policy,
    items_available: Mapping[str, int],
    steps_per_epoch: int,
    items_needed: int | None = None,
) -> EvaluationPlan:
    """The evaluation budget's choice of interval and items, for what the job left open.

    Wishes are 10 evaluations, at least one an epoch, on 1,000 items a benchmark (more where a pass needs
    them). Over budget the items shrink to what a pass needs, then the interval grows up to the whole run,
    and only then the items shrink further, never under 50.

    Args:
        seconds_per_step: Of training.
        seconds_per_item: Of evaluation, by benchmark name (general and domain).
        total_steps: Accepted steps of the job.
        policy: What it fixes (`eval_interval`, `gate_items`) is kept.
        items_available: Gate items there are, by benchmark name.
        steps_per_epoch: For `eval_interval: "epoch"`.
        items_needed: `Power.mean.items_for_pass_80`; None takes the assumptions of `power`.
    """
    budget = policy.eval_budget * seconds_per_step * total_steps
    most = max(items_available.values(), default=1)
    needed = min(_default_items_needed(policy) if items_needed is None else items_needed, most)

    def cost(items: int) -> float:
        return sum(
            seconds_per_item[name] * min(items, available)
            for name, available in items_available.items()
        )

    def affordable(items: int, evaluations: int) -> int:
        """The most items up to `items` that so many evaluations can pay for; 0 when none."""
        low, high = 0, items
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if cost(middle) * evaluations <= budget else (low, middle - 1)
            )
        return low

    interval = policy.eval_interval
    if interval == "epoch":
        interval = steps_per_epoch
    wished_items = policy.gate_items or min(max(DEFAULT_GATE_ITEMS, needed), most)
    if interval is not None:
        evaluations = max(total_steps // interval, 1)
        items = policy.gate_items or max(
            affordable(wished_items, evaluations), min(FEWEST_ITEMS, most)
        )
        return EvaluationPlan(eval_interval=min(interval, total_steps), gate_items=items)
    wished = max(1, min(math.ceil(total_steps / EVALUATIONS_WISHED), steps_per_epoch, total_steps))
    least = policy.gate_items or needed
    items = affordable(wished_items, math.ceil(total_steps / wished))
    if items >= least:
        return EvaluationPlan(eval_interval=wished, gate_items=max(items, 1))
    evaluations = max(int(budget / cost(least)), 1)
    interval = max(wished, math.ceil(total_steps / evaluations))
    items = policy.gate_items or max(affordable(least, evaluations), min(FEWEST_ITEMS, most))
    return EvaluationPlan(eval_interval=min(interval, total_steps), gate_items=items)


def _default_items_needed(policy: Policy) -> int:
    probe = PlannedBenchmark("mean", Scorer.MULTIPLE_CHOICE, 1.0, None, DEFAULT_GATE_ITEMS)
    estimate = power(policy, [probe]).mean
    needed = None if estimate is None else estimate.items_for_pass_80
    return DEFAULT_GATE_ITEMS if needed is None else needed


def _expect(benchmark: PlannedBenchmark) -> _Expected:
    if benchmark.baseline is None:
        return _Expected(benchmark, ASSUMED_ACCURACY, ASSUMED_NLL_TOKENS, is_at_floor=False)
    scores = benchmark.baseline[np.isfinite(benchmark.baseline)]
    if benchmark.scorer is Scorer.NLL:
        tokens = benchmark.baseline_tokens
        known = None if tokens is None else tokens[np.isfinite(tokens) & (tokens > 0)]
        size = ASSUMED_NLL_TOKENS if known is None or not known.size else float(known.mean())
        return _Expected(benchmark, ASSUMED_ACCURACY, size, is_at_floor=False)
    at_floor = not is_above_chance(scores, benchmark.chance)
    accuracy = float(scores.mean(dtype=np.float64)) if scores.size else 0.0
    return _Expected(benchmark, accuracy, 0.0, is_at_floor=at_floor)


def _counts(expected: _Expected) -> bool:
    return not expected.is_at_floor and expected.source.n_items >= 2


def _benchmark_power(policy: Policy, expected: _Expected, alpha: float) -> PowerEstimate:
    source = expected.source
    is_nll = source.scorer is Scorer.NLL
    limit = policy.max_nll_increase if is_nll else source.max_drop or policy.max_drop
    if not _counts(expected):
        return PowerEstimate(
            n_items=source.n_items,
            limit=limit,
            regress_at_80=None,
            pass_at_zero=None,
            items_for_pass_80=None,
            at_floor=expected.is_at_floor,
        )
    return _estimate_power(_estimator(expected), limit, alpha, source.n_items)


def _estimator(expected: _Expected) -> _Estimator:
    """Of one benchmark."""
    if expected.source.scorer is not Scorer.NLL:
        return _mean_estimator([expected])
    return lambda drop, n: _nll_estimate(
        expected, drop, expected.source.n_items if n is None else n
    )


def _mean_estimator(expected: Sequence[_Expected]) -> _Estimator:
    return lambda drop, n: _mean_estimate(expected, drop, n)


def _recommend(
    limited: Sequence[tuple[_Estimator, float]], n_limits: int, look: int
) -> Recommendation | None:
    """For what a pass needs: the mean and every NLL, each with its limit; taken to err independently."""
    if not limited:
        return None
    alpha = alpha_spent(look) / n_limits
    for_pass = _fewest_items(
        lambda n: math.prod(_pass_chance(estimate(0.0, n), limit) for estimate, limit in limited),
        WANTED_POWER,
    )
    for_regress = _fewest_items(
        lambda n: min(
            _regress_chance(estimate(limit + DETECTION_MARGIN, n), limit, alpha)
            for estimate, limit in limited
        ),
        WANTED_DETECTION,
    )
    is_reached = for_pass is not None and for_regress is not None
    most = max(for_pass or MAX_ITEMS, for_regress or MAX_ITEMS)
    return Recommendation(
        items=most if is_reached else None,
        binds="pass" if for_pass is None or for_pass == most else "regress",
        look=look,
        items_for_pass=for_pass,
        items_for_regress=for_regress,
    )


def _estimate_power(
    estimate: _Estimator, limit: float, alpha: float, n_items: int
) -> PowerEstimate:
    """Power of one limit."""
    return PowerEstimate(
        n_items=n_items,
        limit=limit,
        regress_at_80=_regress_at(lambda drop: estimate(drop, None), limit, alpha),
        pass_at_zero=_pass_chance(estimate(0.0, None), limit),
        items_for_pass_80=_fewest_items(
            lambda items: _pass_chance(estimate(0.0, items), limit), WANTED_POWER
        ),
        items_for_regress_90=_fewest_items(
            lambda items: _regress_chance(estimate(limit + DETECTION_MARGIN, items), limit, alpha),
            WANTED_DETECTION,
        ),
    )


def _pass_chance(estimate: DropEstimate, limit: float) -> float:
    quantile = t_quantile(estimate.dof, 1 - UPPER_LEVEL)
    return normal_cdf((limit - estimate.drop) / estimate.stderr - quantile)


def _regress_chance(estimate: DropEstimate, limit: float, alpha: float) -> float:
    quantile = t_quantile(estimate.dof, 1 - alpha)
    return normal_cdf((estimate.drop - limit) / estimate.stderr - quantile)


def _regress_at(
    estimate: Callable[[float], DropEstimate], limit: float, alpha: float
) -> float | None:
    """The smallest true drop with lower bound above `limit` in 80 % of samples; None: not even a total loss."""

    def chance(drop: float) -> float:
        return _regress_chance(estimate(drop), limit, alpha)

    low, high = limit, 1.0
    if chance(high) < WANTED_POWER:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= WANTED_POWER else (middle, high)
    return high


def _fewest_items(chance: Callable[[int], float], wanted: float) -> int | None:
    """The smallest number of items a benchmark with at least this chance; None: out of reach."""
    low, high = 2, MAX_ITEMS
    if chance(high) < wanted:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= wanted else (middle + 1, high)
    return low


def _mean_estimate(expected: Sequence[_Expected], drop: float, n: int | None) -> DropEstimate:
    return relative_drop(
        [
            _expected_moments(
                e.source.weight, e.accuracy, drop, e.source.n_items if n is None else n
            )
            for e in expected
        ]
    )


def _expected_moments(weight: float, accuracy: float, drop: float, n: int) -> GroupMoments:
    """Moments that `paired_moments` would find for a true relative drop, with 10 % discordant items where they fit."""
    lost = (ASSUMED_DISCORDANCE + drop * accuracy) / 2
    won = min(max(lost - drop * accuracy, 0.0), 1.0 - accuracy)
    lost = min(won + drop * accuracy, accuracy)
    value = accuracy - lost + won
    both = accuracy - lost
    scale = (n + 1.0) * n  # n + 2 items with the two pseudo-items, minus one; over n
    return GroupMoments(
        weight=weight,
        baseline=accuracy,
        value=value,
        baseline_variance=(n * accuracy * (1 - accuracy) + 0.5) / scale,
        value_variance=(n * value * (1 - value) + 0.5) / scale,
        covariance=(n * (both - accuracy * value) - 0.5) / scale,
        dof=n - 1.0,
    )


def _nll_estimate(expected: _Expected, drop: float, n: int) -> DropEstimate:
    """As `paired_nll_increase` would find it for documents of equal size, pseudo-documents included."""
    residuals = n * (ASSUMED_NLL_SPREAD * expected.tokens) ** 2 + 2.0
    stderr = math.sqrt(n / (n - 1) * residuals) / (n * expected.tokens)
    return DropEstimate(drop=drop, stderr=stderr, dof=n - 1.0)
