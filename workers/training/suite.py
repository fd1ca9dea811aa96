"""The benchmarks a run is watched by: which items, their baseline, and what a model scores on them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.domain.benchmarks import (
    DEFAULT_GATE_ITEMS,
    BenchmarkKind,
    BenchmarkScores,
    Scorer,
    Scores,
    item_id,
    pack_array,
    split_items,
    unpack_array,
)
from app.domain.forecast import Scoring
from app.domain.policy import Policy
from app.domain.power import PlannedBenchmark, power
from app.domain.runplan import BenchmarkPlan
from app.domain.sensing import SensedBenchmark

FRONTIER_POINTS = 11
FRONTIER_ITEMS = 300  # gate items a benchmark and point of the line from base to tuned

Indices = NDArray[np.int64]
Half = Literal["gate", "report"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores of one model on some items of one benchmark, of full length, NaN elsewhere."""

    scores: Scores
    tokens: Scores | None

    def packed(
        self, version_id: str, item_set: Literal["gate", "report", "all"]
    ) -> BenchmarkScores:
        """As it travels."""
        return BenchmarkScores(
            benchmark_version_id=version_id,
            item_set=item_set,
            scores=pack_array(self.scores),
            tokens=None if self.tokens is None else pack_array(self.tokens),
        )


Score = Callable[[BenchmarkPlan, Indices], Measured]  # of the model as it stands
Marks = dict[str, Measured]  # by benchmark version


@dataclass
class Watched:
    """One benchmark with its items' halves and baseline."""

    plan: BenchmarkPlan
    item_ids: tuple[str, ...]
    chances: NDArray[np.float64]  # of a guess, by item
    baseline: Measured
    seconds_per_item: float | None = None

    @classmethod
    def read(cls, plan: BenchmarkPlan) -> "Watched":
        """From the benchmark's file and the baseline that the plan carries."""
        items = [json.loads(line) for line in Path(plan.path).read_text().splitlines() if line]
        baseline = np.full(len(items), np.nan, np.float32)
        if plan.baseline_scores is not None:
            baseline = unpack_array(plan.baseline_scores)
        tokens = None
        if plan.baseline_tokens is not None:
            tokens = unpack_array(plan.baseline_tokens)
        return cls(
            plan,
            tuple(item_id(item) for item in items),
            np.asarray([_chance(plan.scorer, item) for item in items]),
            Measured(baseline, tokens),
        )

    def half(self, half: Half, gate_items: int) -> Indices:
        """Items of the gate or of the report set."""
        gate, report = split_items(self.item_ids, gate_items)
        return gate if half == "gate" else report

    def sensed(self, measured: Measured, indices: Indices) -> SensedBenchmark:
        """As the sensor reads it."""
        base = self.baseline
        return SensedBenchmark(
            name=self.plan.name,
            benchmark_version_id=self.plan.benchmark_version_id,
            scorer=self.plan.scorer,
            weight=self.plan.weight,
            max_drop=self.plan.max_drop,
            baseline=base.scores[indices],
            current=measured.scores[indices],
            baseline_tokens=None if base.tokens is None else base.tokens[indices],
            current_tokens=None if measured.tokens is None else measured.tokens[indices],
            chance=float(self.chances[indices].mean()) if indices.size else 0.0,
        )

    def value(self, measured: Measured, indices: Indices) -> float | None:
        """Mean score, or nats per token, over the items that were scored; None when none was."""
        scores = measured.scores[indices].astype(np.float64)
        usable = np.isfinite(scores)
        if not usable.any():
            return None
        if self.plan.scorer is Scorer.NLL and measured.tokens is not None:
            tokens = measured.tokens[indices].astype(np.float64)
            return float(scores[usable].sum() / max(tokens[usable].sum(), 1.0))
        return float(scores[usable].mean())

    @property
    def is_general(self) -> bool:
        """Watched for drops."""
        return self.plan.kind is BenchmarkKind.GENERAL


@dataclass
class Suite:
    """All benchmarks of a run. `score` measures the model as it stands at the call."""

    benchmarks: tuple[Watched, ...]
    score: Score
    gate_items: int
    seconds: dict[str, float] = field(default_factory=dict)
    _sizes: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # gate, report

    @classmethod
    def read(cls, plans: Sequence[BenchmarkPlan], score: Score, gate_items: int) -> "Suite":
        """From the plan's files."""
        return cls(tuple(Watched.read(plan) for plan in plans), score, gate_items)

    def measure_baseline(self, watched: Watched) -> Measured | None:
        """Scores the starting model on the gate and report items that have no baseline; None where all have."""
        needed = np.union1d(
            watched.half("gate", self.gate_items), watched.half("report", self.gate_items)
        )
        missing = needed[np.isnan(watched.baseline.scores[needed])]
        if not missing.size:
            return None
        measured = self._score(watched, missing)
        watched.baseline = _join(watched.baseline, measured, missing)
        return measured

    def measure(self, half: Half, *, at_most: int | None = None) -> Marks:
        """Scores the model on one half, or on the first `at_most` items of it a benchmark."""
        return {
            watched.plan.benchmark_version_id: self._score(
                watched, self.indices(watched, half, at_most=at_most)
            )
            for watched in self.benchmarks
        }

    def indices(self, watched: Watched, half: Half, *, at_most: int | None = None) -> Indices:
        """Items of a half; `at_most` keeps evenly spaced ones."""
        indices = watched.half(half, self.gate_items)
        if at_most is None or indices.size <= at_most:
            return indices
        return indices[np.linspace(0, indices.size - 1, at_most).astype(np.int64)]

    def time_items(self, most: int) -> dict[str, float]:
        """Seconds an item by benchmark, from the baseline's pass or from scoring `most` items."""
        for watched in self.benchmarks:
            if watched.seconds_per_item is None:
                self._score(watched, self.indices(watched, "gate", at_most=most))
        return {w.plan.name: w.seconds_per_item or 0.0 for w in self.benchmarks}

    def scoring(self) -> Scoring:
        """Seconds that scoring takes, by each benchmark's last pass."""

        gate = report = point = 0.0
        for watched in self.benchmarks:
            key = (watched.plan.benchmark_version_id, self.gate_items)
            if key not in self._sizes:  # asked at every step, and the split hashes every item
                both = split_items(watched.item_ids, self.gate_items)
                self._sizes[key] = (both[0].size, both[1].size)
            sizes, seconds = self._sizes[key], watched.seconds_per_item or 0.0
            gate += seconds * sizes[0]
            report += seconds * sizes[1]
            point += seconds * min(sizes[0], FRONTIER_ITEMS)
        return Scoring(gate, report, (point,) * FRONTIER_POINTS)

    def sensed(
        self, marks: Marks, half: Half, *, at_most: int | None = None
    ) -> list[SensedBenchmark]:
        """The general benchmarks as the sensor reads them."""
        return [
            watched.sensed(
                marks[watched.plan.benchmark_version_id],
                self.indices(watched, half, at_most=at_most),
            )
            for watched in self.benchmarks
            if watched.is_general
        ]

    def packed(self, marks: Marks, half: Half) -> tuple[BenchmarkScores, ...]:
        """As they travel: infinite where an item of the half was scored and no finite number came out."""
        found = []
        for watched in self.benchmarks:
            version = watched.plan.benchmark_version_id
            scores, indices = marks[version].scores.copy(), self.indices(watched, half)
            scores[indices] = np.where(np.isfinite(scores[indices]), scores[indices], np.inf)
            found.append(Measured(scores, marks[version].tokens).packed(version, half))
        return tuple(found)

    def mean(
        self, marks: Marks, kind: BenchmarkKind, half: Half, *, at_most: int | None = None
    ) -> float | None:
        """Weighted mean of the accuracies of one kind; NLL benchmarks stay out."""
        total, weights = 0.0, 0.0
        for watched in self.benchmarks:
            if watched.plan.kind is not kind or watched.plan.scorer is Scorer.NLL:
                continue
            value = watched.value(
                marks[watched.plan.benchmark_version_id],
                self.indices(watched, half, at_most=at_most),
            )
            if value is not None:
                total += watched.plan.weight * value
                weights += watched.plan.weight
        return total / weights if weights else None

    def _score(self, watched: Watched, indices: Indices) -> Measured:
        started = time.perf_counter()
        measured = self.score(watched.plan, indices)
        if indices.size:
            watched.seconds_per_item = (time.perf_counter() - started) / indices.size
        return measured


def planned_benchmarks(suite: Suite) -> list[PlannedBenchmark]:
    """The general benchmarks with their baselines, as the planner of evaluations reads them."""
    return [
        PlannedBenchmark(
            name=w.plan.name,
            scorer=w.plan.scorer,
            weight=w.plan.weight,
            max_drop=w.plan.max_drop,
            n_items=int(w.half("gate", suite.gate_items).size),
            baseline=w.baseline.scores,
            baseline_tokens=w.baseline.tokens,
            chance=float(w.chances.mean()) if w.chances.size else 0.0,
        )
        for w in suite.benchmarks
        if w.is_general
    ]


def most_gate_items(policy: Policy) -> int:
    """Gate items that get a baseline where the job left their number open: all that a pass may need."""
    if policy.gate_items is not None:
        return policy.gate_items
    probe = PlannedBenchmark("mean", Scorer.MULTIPLE_CHOICE, 1.0, None, DEFAULT_GATE_ITEMS)
    mean = power(policy, [probe]).mean
    needed = None if mean is None else mean.items_for_pass_80
    return max(DEFAULT_GATE_ITEMS, needed or 0)


def _chance(scorer: Scorer, item: dict[str, Any]) -> float:
    return 1.0 / len(item["choices"]) if scorer is Scorer.MULTIPLE_CHOICE else 0.0


def _join(old: Measured, new: Measured, indices: Indices) -> Measured:
    scores, tokens = old.scores.copy(), new.tokens
    scores[indices] = new.scores[indices]
    if new.tokens is not None:
        tokens = (
            np.full(len(scores), np.nan, np.float32) if old.tokens is None else old.tokens.copy()
        )
        tokens[indices] = new.tokens[indices]
    return Measured(scores, tokens)
