"""Whether a regression cost format or knowledge, told by what a few replay steps bring back, and what follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.domain.benchmarks import Scorer
from app.domain.decisions import (
    ControllerState,
    Damage,
    Decision,
    Diagnosis,
    Look,
    Reading,
    Verdict,
)
from app.domain.policy import Policy
from app.domain.sensing import SensedBenchmark
from app.domain.statistics import DropEstimate, lower_bound, upper_bound

Floats = NDArray[np.floating]

HALF = 0.5  # of the drop: format is at least that much back, knowledge less
LEVEL = 0.05  # one-sided, of both bounds
HARM = (
    0.1  # nats per token that the replay steps may cost other general rows and still say something
)
MIN_ITEMS = 10  # fewer are no basis


@dataclass(frozen=True, slots=True)
class Lost:
    """One benchmark's part in a drop: scores of the same items by the baseline, before and after the replay.

    `scale` turns the mean change of an item (of `nll`: nats per token, with `tokens`) into shares of the limit.
    """

    name: str
    scale: float
    baseline: Floats
    before: Floats
    after: Floats | None = None
    tokens: Floats | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """How much of a drop came back."""

    drop: float  # in limits
    estimate: DropEstimate  # of the share that came back
    n_items: int


def find_lost(
    policy: Policy, reading: Reading, sensed: Sequence[SensedBenchmark]
) -> tuple[Lost, ...]:
    """The benchmarks in which a reading's confirmed drop lies, each item with its two scores.

    The mean's drop lies in all of its benchmarks; one that passed a limit of its own, or an NLL, is taken by
    itself.
    """
    by_name = {found.name: found for found in reading.benchmarks}
    is_mean = reading.lower is not None and reading.lower > reading.limit
    accuracies = [
        s for s in sensed if s.scorer is not Scorer.NLL and by_name[s.name].drop is not None
    ]
    whole = sum(s.weight * (by_name[s.name].baseline or 0.0) for s in accuracies)
    lost = []
    for one in sensed:
        found = by_name[one.name]
        if one.current is None or found.drop is None:
            continue
        has_own = found.verdict is Verdict.REGRESS
        if one.scorer is Scorer.NLL and has_own:
            lost.append(_of_nll(one, 1.0 / policy.max_nll_increase))
        elif one.scorer is not Scorer.NLL and (is_mean or has_own):
            scale = one.weight / max(whole, 1e-12) / policy.max_drop
            lost.append(Lost(one.name, scale, one.baseline, one.current))
    return tuple(lost)


def with_scores(lost: Lost, after: Floats) -> Lost:
    """The same with the scores after the replay steps, aligned with its items."""
    return replace(lost, after=after)


def measure_recovery(parts: Sequence[Lost]) -> Recovery | None:
    """The share of the drop that came back, paired by item; None where these items show no drop.

    Share R = gained / lost, both sums over benchmarks of scaled mean changes; delta method on the residuals
    gained - R * lost, with one pseudo-item moved each way a benchmark, so that no interval has width 0.
    """
    measured = [_changes(part) for part in parts if part.after is not None]
    measured = [each for each in measured if each.lost.size >= 2]
    lost = sum(each.scale * float(each.lost.sum()) / each.divisor for each in measured)
    gained = sum(each.scale * float(each.gained.sum()) / each.divisor for each in measured)
    n_items = sum(int(each.lost.size) for each in measured)
    if n_items < MIN_ITEMS or lost <= 0:
        return None
    share = gained / lost
    variance = 0.0
    for each in measured:
        residuals = each.gained - share * each.lost
        centred = np.append(residuals - each.mean(residuals), (1.0, -1.0))
        n = each.lost.size
        variance += n / (n - 1) * float(np.sum(centred**2)) * (each.scale / each.divisor) ** 2
    estimate = DropEstimate(
        drop=share,
        stderr=math.sqrt(variance) / lost,
        dof=float(min(each.lost.size for each in measured) - 1),
    )
    return Recovery(drop=lost, estimate=estimate, n_items=n_items)


def conclude(
    recovery: Recovery | None, probe: Diagnosis, benchmarks: Sequence[str] = ()
) -> Diagnosis:
    """The diagnosis with its numbers, from what the replay steps were and what they brought back."""
    probe = probe.model_copy(update={"benchmarks": tuple(benchmarks)})
    if recovery is None:
        return probe.model_copy(update={"reason": "the items scored again show no drop"})
    estimate = recovery.estimate
    return probe.model_copy(
        update={
            "n_items": recovery.n_items,
            "drop": recovery.drop,
            "share": estimate.drop,
            "lower": lower_bound(estimate, LEVEL),
            "upper": upper_bound(estimate, LEVEL),
        }
    )


def kind_of(diagnosis: Diagnosis | None) -> Damage:
    """`format` when at least half came back for certain, `knowledge` when less than half did, else `unclear`.

    Replay steps that harmed other general rows say nothing of what was lost.
    """
    if diagnosis is None or diagnosis.lower is None or diagnosis.upper is None:
        return Damage.UNCLEAR
    if _is_harmful(diagnosis):
        return Damage.UNCLEAR
    if diagnosis.lower >= HALF:
        return Damage.FORMAT
    return Damage.KNOWLEDGE if diagnosis.upper < HALF else Damage.UNCLEAR


def describe_diagnosis(diagnosis: Diagnosis) -> str:
    """The diagnosis as a sentence with its numbers."""
    kind = kind_of(diagnosis)
    if diagnosis.share is None or diagnosis.lower is None or diagnosis.upper is None:
        return f"Diagnosis: {kind}, {diagnosis.reason}."
    said = "the replay steps did harm" if _is_harmful(diagnosis) else _came_back(diagnosis)
    return (
        f"Diagnosis: {kind}, {said} ({diagnosis.steps} steps on {diagnosis.rows} general rows,"
        f" {diagnosis.n_items} other items, bounds {diagnosis.lower:.0%} to {diagnosis.upper:.0%})."
    )


def why_no_repair(policy: Policy, state: ControllerState, look: Look) -> str | None:
    """Why the ladder does not begin with repair; None where it does."""
    if not policy.ladder.repair:
        return "off by policy"
    if state.repaired:
        return "done since the last pass"
    if not look.repair_possible:
        return "not possible for this run"
    if look.diagnosis is not None and kind_of(look.diagnosis) is Damage.KNOWLEDGE:
        return f"put last, knowledge was lost: {_came_back(look.diagnosis)}"
    return None


def can_repair(policy: Policy, state: ControllerState, look: Look) -> bool:
    """Whether repair is open at all, whatever the diagnosis puts before it."""
    return why_no_repair(policy, state, look.model_copy(update={"diagnosis": None})) is None


def with_diagnosis(decision: Decision, look: Look) -> Decision:
    """The decision with the diagnosis in its reason and its details."""
    if look.diagnosis is None:
        return decision
    return decision.model_copy(
        update={
            "reason": f"{decision.reason} {describe_diagnosis(look.diagnosis)}",
            "details": decision.details | {"diagnosis": show_diagnosis(look.diagnosis)},
        }
    )


def replay_rate(diagnosis: Diagnosis | None) -> float | None:
    """The rate at which a repair takes the replay steps for good before it scales back; None where it takes none."""
    if diagnosis is None or kind_of(diagnosis) is not Damage.FORMAT:
        return None
    return diagnosis.rate


def show_diagnosis(diagnosis: Diagnosis) -> dict[str, object]:
    """Its kind and its numbers."""
    return {"kind": kind_of(diagnosis).value, **diagnosis.model_dump(mode="json")}


def _is_harmful(diagnosis: Diagnosis) -> bool:
    before, after = diagnosis.held_before, diagnosis.held_after
    return before is not None and after is not None and after > before + HARM


def _came_back(diagnosis: Diagnosis) -> str:
    return f"{diagnosis.share or 0.0:.0%} of the drop came back by a few replay steps"


def _of_nll(one: SensedBenchmark, scale: float) -> Lost:
    current = np.zeros(0) if one.current is None else one.current
    return Lost(one.name, scale, one.baseline, current, tokens=one.baseline_tokens)


@dataclass(frozen=True, slots=True)
class _Changes:
    """Of one benchmark's usable items: what each lost and what came back, better being more."""

    scale: float
    lost: NDArray[np.float64]
    gained: NDArray[np.float64]
    divisor: float  # items, or their tokens
    share_of_items: NDArray[np.float64]  # of each in the divisor

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each item would have if all were alike."""
        return self.share_of_items * float(values.sum())


def _changes(part: Lost) -> _Changes:
    after = np.zeros(0) if part.after is None else part.after
    stacked = np.stack([part.baseline, part.before, after]).astype(np.float64)
    usable = np.isfinite(stacked).all(axis=0)
    if part.tokens is not None:
        usable &= part.tokens > 0
    baseline, before, then = stacked[:, usable]
    sizes = np.ones(baseline.size) if part.tokens is None else part.tokens[usable].astype(float)
    sign = 1.0 if part.tokens is None else -1.0
    divisor = float(sizes.sum())
    return _Changes(
        scale=part.scale,
        lost=sign * (baseline - before),
        gained=sign * (then - before),
        divisor=max(divisor, 1.0),
        share_of_items=sizes / max(divisor, 1.0),
    )
