"""The retention budget of a lineage: what each version lost against its parent and against the root."""

import math
from collections.abc import Sequence

from app.domain.decisions import Reading
from app.domain.frozen import Frozen
from app.domain.policy import Policy
from app.domain.sensing import SensedBenchmark, read_report


class BenchmarkDrop(Frozen):
    """One benchmark of two versions, on the same items: relative drop, or of `nll` the rise in nats per token."""

    name: str
    n_items: int
    before: float | None
    after: float | None
    drop: float | None
    lower: float | None
    upper: float | None


class Loss(Frozen):
    """What a version lost against another: the weighted general mean, and every benchmark; 5 % bounds each side."""

    drop: float | None
    lower: float | None
    upper: float | None
    benchmarks: tuple[BenchmarkDrop, ...] = ()
    is_chained: bool = False  # not measured, but put together from the drops of the steps between


def loss_of(reading: Reading | None) -> Loss | None:
    """A reading as an entry of the ledger; None where nothing was measured."""
    if reading is None or (reading.drop is None and not reading.benchmarks):
        return None
    return Loss(
        drop=reading.drop,
        lower=reading.lower,
        upper=reading.upper,
        benchmarks=tuple(
            BenchmarkDrop(
                name=found.name,
                n_items=found.n_items,
                before=found.baseline,
                after=found.value,
                drop=found.drop,
                lower=found.lower,
                upper=found.upper,
            )
            for found in reading.benchmarks
        ),
    )


def measure_loss(benchmarks: Sequence[SensedBenchmark]) -> Loss | None:
    """Paired scores of two versions as an entry of the ledger; None where nothing can be compared."""
    if not benchmarks:
        return None
    reading = read_report(Policy(), benchmarks)
    if reading.drop is None and all(found.drop is None for found in reading.benchmarks):
        return None
    return loss_of(reading)


def chain_losses(earlier: Loss | None, step: Loss | None) -> Loss | None:
    """The loss of two steps after each other, where nobody compared the ends: 1 - (1 - a)(1 - b).

    The bounds of steps don't add up to bounds of the whole, so it has none.
    """
    if earlier is None or step is None or earlier.drop is None or step.drop is None:
        return None
    drop = 1 - math.prod((1 - earlier.drop, 1 - step.drop))
    return Loss(drop=drop, lower=None, upper=None, is_chained=True)
