"""What evaluations read over a job: baseline, gate, report, frontier and validation."""

import math
from typing import Final, Literal, NamedTuple

from app.domain.benchmarks import DEFAULT_GATE_ITEMS
from app.domain.frozen import Frozen

FRONTIER_POINTS: Final = 11
FRONTIER_ITEMS: Final = 300
#: New tokens of an item that is answered by generating, on average.
ANSWER_TOKENS: Final = 16


class BenchmarkRows(Frozen):
    """A benchmark that a job watches."""

    name: str
    num_items: int
    item_tokens: float  # read for one item
    generates: bool
    has_baseline: bool = False  # cached from another job


class EvaluationRows(Frozen):
    """What a job is evaluated on, and how often."""

    benchmarks: tuple[BenchmarkRows, ...] = ()
    validation_tokens: int = 0
    eval_interval: int | Literal["budget"] = "budget"  # steps
    eval_budget: float = 0.1  # share of training time, where the interval is left open
    gate_items: int | None = None


class EvaluationWork(NamedTuple):
    """Tokens read and tokens decoded in each phase, all evaluations together."""

    by_phase: dict[str, tuple[int, int]]
    num_evaluations: int
    mean_tokens: float
    is_budgeted: bool
    budget_seconds: float

    @property
    def tokens(self) -> int:
        """Read and decoded, over the whole job."""
        return sum(read + decoded for read, decoded in self.by_phase.values())


def evaluation_work(rows: EvaluationRows, *, steps: int, train_seconds: float) -> EvaluationWork:
    """What is read in each phase; a budget's evaluations are seconds, as it chooses items and interval by them.

    Args:
        rows: What there is.
        steps: Of the job.
        train_seconds: What a budget is a share of.
    """
    is_budgeted = rows.eval_interval == "budget" and bool(rows.benchmarks)
    interval = steps if isinstance(rows.eval_interval, str) else max(rows.eval_interval, 1)
    count = math.ceil(steps / interval) if steps else 0
    gate = rows.gate_items or DEFAULT_GATE_ITEMS

    def items(at_most: int) -> tuple[int, int]:
        read = decoded = 0.0
        for benchmark in rows.benchmarks:
            chosen = min(benchmark.num_items / 2, at_most)
            read += chosen * benchmark.item_tokens
            decoded += chosen * ANSWER_TOKENS * benchmark.generates
        return round(read), round(decoded)

    fresh = [benchmark for benchmark in rows.benchmarks if not benchmark.has_baseline]
    baseline = (
        round(sum(b.num_items * b.item_tokens for b in fresh)),
        round(sum(b.num_items * ANSWER_TOKENS * b.generates for b in fresh)),
    )
    validation = rows.validation_tokens
    read, decoded = (0, 0) if is_budgeted else items(gate)
    report = items(10**9)
    frontier = items(min(gate, FRONTIER_ITEMS))
    is_measured = bool(rows.benchmarks) or validation > 0
    points = FRONTIER_POINTS if is_measured else 0
    num_items = sum(b.num_items for b in rows.benchmarks)
    mean = (
        sum(b.num_items * b.item_tokens for b in rows.benchmarks) / num_items if num_items else 64
    )
    return EvaluationWork(
        by_phase={
            "baseline": baseline,
            "evaluating": (
                count * (read + validation) + report[0],
                count * decoded + report[1],
            ),
            "frontier": (points * (frontier[0] + validation), points * frontier[1]),
        },
        num_evaluations=count,
        mean_tokens=mean,
        is_budgeted=is_budgeted,
        budget_seconds=rows.eval_budget * train_seconds if is_budgeted else 0.0,
    )
