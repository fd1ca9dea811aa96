"""An armed strategy: how many raises lie between its activation and an evaluation that holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from app.domain.decisions import Verdict
from app.domain.policy import Policy
from tests.benchmarks.controllers.figures import Interval, share
from tests.benchmarks.controllers.plants import Plant
from tests.benchmarks.controllers.runs import LOOKS, Run, simulate

RANGE: Final = (1 / 16, 8.0)  # needed strength over the default at which the strategy is activated
MOST_RAISES: Final = 2


@dataclass(frozen=True, slots=True)
class Activation:
    """One simulated regression under an armed strategy."""

    confirmed_at: int  # evaluation whose decision activated it, from 1
    raises: int | None  # after activation, until every estimate was within its limit; None: never
    looks: int | None  # evaluations from activation until then
    never_regressed: bool  # from then on no drop was confirmed


@dataclass(frozen=True, slots=True)
class Summary:
    """Of many activations."""

    n: int
    few_raises: Interval
    kept: Interval  # share that held with few raises and never regressed again
    mean_looks: float


def draw_plant(rng: np.random.Generator) -> Plant:
    """A plant of the stated range; what is drawn is log-uniform or uniform."""
    return Plant(
        "drawn",
        "of the stated range",
        needs=math.exp(rng.uniform(math.log(RANGE[0]), math.log(RANGE[1]))),
        free=rng.uniform(0.06, 0.15),
        steepness=rng.uniform(0.7, 1.5),
        pace=rng.uniform(0.4, 0.9),
        delay=int(rng.integers(0, 2)),
    )


def observe(run: Run) -> Activation | None:
    """What came of a run under an armed strategy; None where no drop was ever confirmed."""
    at = next((i for i, step in enumerate(run.steps) if step.after > 0), None)
    if at is None:
        return None
    later = run.steps[at + 1 :]
    home = next((i for i, step in enumerate(later) if step.is_holding), None)
    return Activation(
        confirmed_at=at + 1,
        raises=None if home is None else sum(s.after > s.strength for s in later[:home]),
        looks=None if home is None else home + 1,
        never_regressed=home is not None
        and all(s.reading.verdict is not Verdict.REGRESS for s in later[home:]),
    )


def measure(policy: Policy, seeds: Sequence[int], *, looks: int = LOOKS) -> Summary:
    """Activations of plants drawn by seed; runs without a confirmed drop are no regressions and don't count."""
    found = []
    for seed in seeds:
        plant = draw_plant(np.random.default_rng([seed, 3]))
        seen = observe(simulate(plant, policy, seed, armed=True, looks=looks))
        if seen is not None:
            found.append(seen)
    few = [one for one in found if one.raises is not None and one.raises <= MOST_RAISES]
    waited = [one.looks for one in found if one.looks is not None]
    return Summary(
        n=len(found),
        few_raises=share(len(few), len(found)),
        kept=share(sum(one.never_regressed for one in few), len(found)),
        mean_looks=float(np.mean(waited)) if waited else math.nan,
    )
