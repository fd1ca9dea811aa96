"""Simulated jobs under the sensor: suites, looks of many jobs at once, and the item scores they stand for."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.domain.benchmarks import Scorer
from app.domain.policy import Policy
from app.domain.power import ASSUMED_DISCORDANCE, ASSUMED_NLL_SPREAD, PlannedBenchmark
from app.domain.sensing import SensedBenchmark

# Shape letters: J jobs, B benchmarks with right and wrong answers, T texts.
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

TOKENS = 200.0  # of every simulated document
BEFORE = 3.0  # nats per token of the baseline
CHANCE = 0.25  # of every item: four choices
KNOWN_ITEMS = 20_000  # of the baselines that `power` gets: large, so that what it says is no chance


@dataclass(frozen=True, slots=True)
class Suite:
    """What simulated jobs are watched by: benchmarks of these true accuracies, some at chance, and texts.

    Whether each benchmark has a limit of its own (equal to the mean's), beside the mean's.
    """

    name: str
    accuracies: tuple[float, ...]
    n_texts: int = 0
    n_at_chance: int = 0
    has_own_limits: bool = False
    discordance: float = ASSUMED_DISCORDANCE

    @property
    def accuracy_B(self) -> Floats:
        """Of every benchmark, those at chance last."""
        return np.asarray(self.accuracies + (CHANCE,) * self.n_at_chance)

    def planned(self, policy: Policy, n_items: int = 1000) -> list[PlannedBenchmark]:
        """As `power()` gets it before training, with a baseline of exactly these accuracies."""
        own = policy.max_drop if self.has_own_limits else None
        found = [
            PlannedBenchmark(
                f"accuracy-{place}",
                Scorer.MULTIPLE_CHOICE,
                1.0,
                own,
                n_items,
                baseline=_right(round(KNOWN_ITEMS * accuracy), KNOWN_ITEMS),
                chance=CHANCE,
            )
            for place, accuracy in enumerate(self.accuracy_B)
        ]
        texts = range(self.n_texts)
        return found + [
            PlannedBenchmark(f"text-{place}", Scorer.NLL, 1.0, None, n_items) for place in texts
        ]


@dataclass(frozen=True, slots=True)
class Looked:
    """One look of many jobs: counts and moments that say all a reading rests on."""

    n: int  # items a benchmark
    right_JB: Counts  # by the baseline
    lost_JB: Counts
    won_JB: Counts
    rise_JT: Floats  # nats per token
    spread_JT: Floats  # standard deviation over documents, nats per token


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of the models of one look."""

    drop_JB: Floats  # relative
    rise_J1: Floats  # nats per token


class Jobs:
    """Many jobs that are looked at again and again; an item's answer stays with correlation `stickiness`."""

    def __init__(
        self, suite: Suite, n_items: int, n_jobs: int, *, stickiness: float, seed: int
    ) -> None:
        """Draws the gate items: which of them the baseline gets right is chance, too."""
        self._suite, self._stickiness = suite, stickiness
        self._rng = np.random.default_rng(seed)
        accuracy_B = suite.accuracy_B
        right_JB = self._rng.binomial(n_items, accuracy_B, (n_jobs, accuracy_B.size))
        nothing_JB = np.zeros_like(right_JB)
        nothing_JT = np.zeros((n_jobs, suite.n_texts))
        self._looked = Looked(n_items, right_JB, nothing_JB, nothing_JB, nothing_JT, nothing_JT)
        self._rates = (np.zeros(right_JB.shape), np.zeros(right_JB.shape))  # of losing, of winning
        self._noise_JT = self._rng.standard_normal(nothing_JT.shape)

    def look(self, truth: Truth) -> Looked:
        """The next look; where the truth changed the answers change at once, and else by and by."""
        before, rng, stay = self._looked, self._rng, self._stickiness
        accuracy_B = self._suite.accuracy_B
        lost_JB, won_JB = flip_rates(accuracy_B, truth.drop_JB, self._suite.discordance)
        rates = (lost_JB / accuracy_B, won_JB / (1 - accuracy_B))
        wrong_JB = before.n - before.right_JB
        self._noise_JT = stay * self._noise_JT + np.sqrt(1 - stay**2) * rng.standard_normal(
            self._noise_JT.shape
        )
        chi2_JT = rng.chisquare(before.n - 1, self._noise_JT.shape)
        self._looked = replace(
            before,
            lost_JB=self._flip(before.lost_JB, before.right_JB, self._rates[0], rates[0]),
            won_JB=self._flip(before.won_JB, wrong_JB, self._rates[1], rates[1]),
            rise_JT=truth.rise_J1 + ASSUMED_NLL_SPREAD * self._noise_JT / np.sqrt(before.n),
            spread_JT=ASSUMED_NLL_SPREAD * np.sqrt(chi2_JT / (before.n - 1)),
        )
        self._rates = rates
        return self._looked

    def _flip(self, flipped: Counts, of: Counts, before: Floats, rate: Floats) -> Counts:
        """How many of so many items are flipped now; a look before, each was with chance `before`.

        A higher rate flips more and leaves the flipped; a lower one puts some back. A rate that stays lets each
        answer be drawn anew, but for the share that sticks.
        """
        rng, stay = self._rng, self._stickiness
        is_same = before == rate
        if stay == 0 and is_same.all():
            return _as_counts(rng.binomial(of, rate))
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = np.where(before > rate, rate / before, 1.0)
            added = np.where(rate > before, (rate - before) / (1 - before), 0.0)
        kept = np.where(is_same, rate + stay * (1 - rate), kept)
        added = np.where(is_same, rate * (1 - stay), added)
        return _as_counts(rng.binomial(flipped, kept) + rng.binomial(of - flipped, added))


def flip_rates(accuracy: Floats, drop: Floats, discordance: float) -> tuple[Floats, Floats]:
    """Shares of all items lost and won: the drop, in a discordance that grows only where it must."""
    fall = drop * accuracy
    won = np.clip((discordance - fall) / 2, 0.0, 1 - accuracy)
    return won + fall, won


def sensed(policy: Policy, suite: Suite, looked: Looked, job: int) -> list[SensedBenchmark]:
    """One job's look as the item scores that `read_sensor` takes."""
    own = policy.max_drop if suite.has_own_limits else None
    found = []
    for place in range(looked.right_JB.shape[1]):
        right, lost, won = (
            int(counts[job, place]) for counts in (looked.right_JB, looked.lost_JB, looked.won_JB)
        )
        baseline = _right(right, looked.n)
        current = baseline.copy()
        current[:lost] = 0
        current[looked.n - won :] = 1
        found.append(
            SensedBenchmark(
                f"accuracy-{place}",
                f"version-{place}",
                Scorer.MULTIPLE_CHOICE,
                1.0,
                own,
                baseline,
                current,
                chance=CHANCE,
            )
        )
    return found + [
        _text(
            place, looked.n, float(looked.rise_JT[job, place]), float(looked.spread_JT[job, place])
        )
        for place in range(suite.n_texts)
    ]


def _text(place: int, n: int, rise: float, spread: float) -> SensedBenchmark:
    """Documents whose changes have exactly this mean and this standard deviation."""
    signs = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    signs -= signs.mean()
    changes = rise + spread * signs / np.std(signs, ddof=1)
    tokens = np.full(n, TOKENS)
    return SensedBenchmark(
        f"text-{place}",
        f"text-version-{place}",
        Scorer.NLL,
        1.0,
        None,
        tokens * BEFORE,
        tokens * (BEFORE + changes),
        baseline_tokens=tokens,
    )


def _right(count: int, n: int) -> Floats:
    scores = np.zeros(n)
    scores[:count] = 1
    return scores


def _as_counts(values: NDArray[np.integer]) -> Counts:
    return np.asarray(values, dtype=np.int64)
