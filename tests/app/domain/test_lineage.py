"""The ledger's arithmetic: paired losses, and losses put together over generations."""

import numpy as np
import pytest

from app.domain.benchmarks import Scorer
from app.domain.lineage import Loss, chain_losses, loss_of, measure_loss
from app.domain.sensing import SensedBenchmark


def sensed(before: int, after: int, n: int = 1000) -> SensedBenchmark:
    baseline, current = np.zeros(n, np.float32), np.zeros(n, np.float32)
    baseline[:before] = 1
    current[:after] = 1
    return SensedBenchmark(
        name="mc",
        benchmark_version_id="v",
        scorer=Scorer.MULTIPLE_CHOICE,
        weight=1.0,
        max_drop=None,
        baseline=baseline,
        current=current,
        chance=0.25,
    )


def test_a_loss_is_the_relative_drop_with_its_bounds_and_benchmarks() -> None:
    found = measure_loss([sensed(800, 720)])
    assert found is not None
    assert found.drop == pytest.approx(0.1)
    assert found.lower is not None
    assert found.upper is not None
    assert 0.05 < found.lower < 0.1 < found.upper < 0.15
    (benchmark,) = found.benchmarks
    assert benchmark.name == "mc"
    assert benchmark.before == pytest.approx(0.8)
    assert benchmark.after == pytest.approx(0.72)


def test_nothing_to_compare_is_no_loss_of_zero() -> None:
    assert measure_loss([]) is None
    assert measure_loss([sensed(250, 100)]) is None  # at floor
    assert loss_of(None) is None


def test_steps_multiply_and_lose_their_bounds() -> None:
    step = Loss(drop=0.03, lower=0.01, upper=0.05)
    whole = chain_losses(chain_losses(step, step), step)
    assert whole is not None
    assert whole.drop == pytest.approx(1 - 0.97**3)
    assert (whole.lower, whole.upper, whole.is_chained) == (None, None, True)
    assert chain_losses(None, step) is None
    assert chain_losses(step, Loss(drop=None, lower=None, upper=None)) is None
