"""Intervals by a two-level bootstrap: seeds with replacement, then the items of each seed drawn."""

# Shape letters: R draws, S seeds, N items, C columns scored on the same items.

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NUM_DRAWS = 1000
LEVEL = 0.95


@dataclass
class TwoLevelBootstrap:
    """Draws shared by all methods, so that differences between methods are paired by seed and item.

    Args:
        num_seeds: Replicates of the whole experiment, each with a base model and rows of its own.
        sizes: Items of each group in every seed; a group is drawn apart from the others.
        num_draws: Replicates of the bootstrap.
        seed: Decides all of them.
    """

    num_seeds: int
    sizes: Mapping[str, int]
    num_draws: int = NUM_DRAWS
    seed: int = 20_240_601
    _seeds_RS: NDArray[np.int64] = field(init=False)
    _shares: dict[str, NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self._seeds_RS = rng.integers(self.num_seeds, size=(self.num_draws, self.num_seeds))
        self._shares = {}
        for group, size in sorted(self.sizes.items()):
            even = [1.0 / size] * size
            drawn = rng.multinomial(size, even, size=(self.num_draws, self.num_seeds))
            self._shares[group] = (drawn / size).astype(np.float32)

    def means(self, group: str, values_SNC: NDArray[np.float32]) -> Floats:
        """Means over items and seeds of each column: (R, C)."""
        total = np.zeros((self.num_draws, values_SNC.shape[2]))
        for slot in range(self.num_seeds):
            chosen = self._seeds_RS[:, slot]
            for seed in range(self.num_seeds):
                rows = np.flatnonzero(chosen == seed)
                total[rows] += self._shares[group][rows, slot] @ values_SNC[seed]
        return total / self.num_seeds


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval."""

    value: float
    low: float
    high: float

    def shown(self, digits: int = 1, scale: float = 100.0) -> str:
        """`3.1 [2.0, 4.4]`."""
        parts = (f"{scale * v:.{digits}f}" for v in (self.value, self.low, self.high))
        value, low, high = ("0." + "0" * digits if float(p) == 0 else p for p in parts)
        return f"{value} [{low}, {high}]"


def interval(value: float, draws_R: Floats, level: float = LEVEL) -> Estimate:
    """The figure and the percentiles of its draws."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws_R, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))
