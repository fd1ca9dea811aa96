"""What the tables show of many runs: shares and means with their intervals, against the best fixed strength."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from scipy import special

from tests.benchmarks.controllers.plants import ASKED, BASE_ACCURACY, LIMIT, Plant, PlantState
from tests.benchmarks.controllers.runs import LOOKS, Run

GOAL_GAP: Final = 0.01  # of domain accuracy, under the best fixed strength
GOAL_HELD: Final = 0.9  # of a plant's jobs
LEVEL: Final = 0.95
GRID: Final = tuple(
    ASKED * 2 ** (k / 8) for k in range(-40, 80)
)  # a 32nd of the default to 939 times it; the cap is 1,000 times


class Interval(NamedTuple):
    """An estimate with its 95 % bounds."""

    value: float
    low: float
    high: float


class Fixed(NamedTuple):
    """The best strength that never changes."""

    strength: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender on one plant."""

    n: int
    held: Interval
    gap: Interval | None  # None: no fixed strength holds
    met: Interval | None  # share of jobs that held within a point of the best fixed strength
    could_not_hold: float
    raises: float
    reversals: float
    turned_often: float  # share of jobs with more than two reversals
    looks: float

    @property
    def meets_goal(self) -> bool:
        """Whether at least 90 % of the jobs hold, on average within a point of the best fixed strength."""
        return self.gap is not None and self.held.value >= GOAL_HELD and self.gap.high <= GOAL_GAP


def sweep(plant: Plant) -> Fixed | None:
    """The best of the strengths of `GRID`, each trained to the end without noise; None: none holds."""
    best: Fixed | None = None
    for strength in GRID:
        state = PlantState()
        for look in range(LOOKS):
            state = plant.train(state, strength, 1.0, None, look=look)
        if state.drop <= LIMIT and (best is None or state.accuracy > best.accuracy):
            best = Fixed(strength, state.accuracy)
    return best


def gap_of(run: Run, best: Fixed) -> float:
    """True domain accuracy that is missing to the best fixed strength; of a job without a version all that was gained."""
    reached = BASE_ACCURACY if run.published is None else run.published.accuracy
    return best.accuracy - reached


def summarise(runs: Sequence[Run], best: Fixed | None) -> Figures:
    """The figures of one contender's runs on one plant."""
    held = [run.held for run in runs]
    gap = met = None
    if best is not None:
        gaps = [gap_of(run, best) for run in runs]
        gap = mean_interval(gaps)
        met = share(sum(h and g <= GOAL_GAP for h, g in zip(held, gaps, strict=True)), len(runs))
    return Figures(
        n=len(runs),
        held=share(sum(held), len(runs)),
        gap=gap,
        met=met,
        could_not_hold=float(np.mean([run.could_not_hold for run in runs])),
        raises=float(np.mean([run.raises for run in runs])),
        reversals=float(np.mean([run.reversals for run in runs])),
        turned_often=float(np.mean([run.reversals > 2 for run in runs])),
        looks=float(np.mean([len(run.steps) for run in runs])),
    )


def share(hits: int, n: int) -> Interval:
    """A share with its Clopper-Pearson interval."""
    tail = (1.0 - LEVEL) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1.0 - tail))
    return Interval(hits / n, low, high)


def mean_interval(values: Sequence[float]) -> Interval:
    """A mean with Student's interval."""
    n = len(values)
    mean = float(np.mean(values))
    width = float(special.stdtrit(n - 1, (1.0 + LEVEL) / 2)) * float(np.std(values, ddof=1))
    return Interval(mean, mean - width / math.sqrt(n), mean + width / math.sqrt(n))
