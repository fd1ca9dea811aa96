"""Simulated trainings: how general ability and domain accuracy answer to a strength and a learning rate."""

import math
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

ASKED: Final = 100.0  # strength of `ewc` where the job names none; a plant's `needs` counts in it
LIMIT: Final = 0.03  # of the default policy
BASE_ACCURACY: Final = 0.40  # on the domain, before training


@dataclass(frozen=True, slots=True)
class PlantState:
    """What a checkpoint of the simulated model holds: its true numbers and the strengths still on their way."""

    drop: float = 0.0
    accuracy: float = BASE_ACCURACY
    pipeline: tuple[float, ...] = ()  # strengths of the last intervals, newest last


@dataclass(frozen=True, slots=True)
class Plant:
    """The settled drop falls with strength, `floor + free / (1 + (s / half)^steepness)`; so does accuracy.

    One interval between evaluations goes the share `pace` of the way to what settles, more slowly at a
    lower learning rate.
    """

    name: str
    about: str
    needs: float  # smallest strength that holds, as a multiple of what was asked
    free: float  # settled drop at strength 0, above the floor
    steepness: float = 1.0
    floor: float = 0.0  # drop that no strength takes away
    noise: float = 0.0  # further drop by steps that are too large: no strength takes it away
    noise_rate: float = 1.0  # at high values halving the learning rate hardly shrinks it
    pace: float = 0.6
    is_immediate: bool = False  # the drop's pace does not depend on the learning rate
    learning_pace: float = 0.3  # of accuracy
    delay: int = 0  # intervals until a strength shows
    wobble: float = 0.0  # standard deviation of the true drop's own noise, an interval
    gain: float = 0.40  # of accuracy at strength 0
    cost_at: float = 400.0  # strength that costs half the gain, as a multiple of `needs`
    cost_steepness: float = 0.7
    recovers_at: int | None = None  # looks after which nothing drops any more
    half: float = field(init=False)

    def __post_init__(self) -> None:
        excess = self.free / (LIMIT - self.floor) - 1.0
        if excess <= 0:  # holds at any strength; `needs` then says where half of the drop is gone
            excess = 1.0
        object.__setattr__(self, "half", self.needs * ASKED / excess ** (1.0 / self.steepness))

    def settled_drop(self, strength: float, rate: float = 1.0) -> float:
        """The true relative drop after long training at this strength and learning-rate scale."""
        by_steps = 0.0
        if self.noise:
            by_steps = (
                self.noise * math.expm1(-rate * self.noise_rate) / math.expm1(-self.noise_rate)
            )
        held = math.pow(strength / self.half, self.steepness)
        return self.floor + by_steps + self.free / (1.0 + held)

    def settled_accuracy(self, strength: float) -> float:
        """The domain accuracy after long training at this strength."""
        cost = math.pow(strength / (self.cost_at * self.needs * ASKED), self.cost_steepness)
        return BASE_ACCURACY + self.gain / (1.0 + cost)

    def train(
        self,
        state: PlantState,
        strength: float,
        rate: float,
        rng: np.random.Generator | None,
        *,
        look: int = 0,
    ) -> PlantState:
        """The state one interval later; without `rng` there is no noise."""
        pipeline = (*state.pipeline, strength)[-(self.delay + 1) :]
        target = self.settled_drop(pipeline[0], rate)
        if self.recovers_at is not None and look >= self.recovers_at:
            target = 0.0
        pace = self.pace if self.is_immediate else _share(self.pace, rate)
        drop = state.drop + pace * (target - state.drop)
        if rng is not None and self.wobble:
            drop += float(rng.normal(0.0, self.wobble))
        learned = _share(self.learning_pace, rate) * (
            self.settled_accuracy(pipeline[0]) - state.accuracy
        )
        return PlantState(drop, state.accuracy + learned, pipeline)

    def scaled_back(self, state: PlantState, alpha: float) -> PlantState:
        """On the line from base (0) to tuned (1): ability comes back sooner than what was learned goes."""
        gained = (state.accuracy - BASE_ACCURACY) * alpha**0.7
        return replace(state, drop=state.drop * alpha**1.5, accuracy=BASE_ACCURACY + gained)


def _share(pace: float, rate: float) -> float:
    return 1.0 - math.pow(1.0 - pace, rate)


STEERABLE: Final = (
    Plant("prompt", "answers within two looks", needs=3.0, free=0.09),
    Plant("slow", "goes 25 % of the way a look", needs=3.0, free=0.09, pace=0.25),
    Plant("delayed", "answers two looks late", needs=4.0, free=0.09, delay=2),
    Plant("noisy", "its true drop wobbles by half a point", needs=3.0, free=0.09, wobble=0.005),
    Plant("sudden", "steep, severe at what was asked", needs=6.0, free=0.12, steepness=2.0),
    Plant("far", "needs 30 times what was asked", needs=30.0, free=0.15),
    Plant(
        "saturating",
        "two thirds of the limit stay at any strength",
        needs=5.0,
        free=0.05,
        floor=0.02,
    ),
    Plant("costly", "twice the strength costs a point", needs=3.0, free=0.09, cost_at=90.0),
)
MILD: Final = (
    Plant("harmless", "half of what was asked suffices", needs=0.5, free=0.09),
    Plant(
        "mild", "what was asked leaves 1.25 limits, too little to confirm", needs=1.5, free=0.075
    ),
)
HOPELESS: Final = (
    Plant("beyond cap", "needs 5,000 times what was asked", needs=5000.0, free=0.10),
    Plant(
        "step noise",
        "the learning rate is far too high; strength changes nothing",
        needs=1.0,
        free=0.0,
        noise=0.085,
        noise_rate=5000.0,
        pace=0.9,
        is_immediate=True,
    ),
)
MENDED: Final = Plant(
    "rate",
    "strength changes nothing, half the learning rate does",
    needs=1.0,
    free=0.0,
    noise=0.05,
    noise_rate=0.01,
    pace=0.9,
    is_immediate=True,
)
