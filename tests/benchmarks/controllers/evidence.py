"""Item outcomes of a simulated model, as the sensor gets them: paired with the baseline, noisy, of fixed items."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from app.domain.benchmarks import Scorer
from app.domain.sensing import SensedBenchmark

CHURN: Final = 0.06  # share of items that an undamaged model answers otherwise than the base
KINSHIP: Final = 0.5  # how much of an item's fate is the item's own and the same at every look
NLL_SHARE: Final = 0.8  # the NLL's rise over its limit, to the mean's drop over its own
NLL_PER_DROP: Final = NLL_SHARE * 0.05 / 0.03
SPREAD: Final = 0.1  # nats per token, over documents
TOKENS: Final = 200.0
ACCURACIES: Final = (
    ("choice", Scorer.MULTIPLE_CHOICE, 0.7),
    ("exact", Scorer.EXACT_MATCH, 0.6),
)


@dataclass(frozen=True, slots=True)
class _Quiz:
    name: str
    scorer: Scorer
    right: NDArray[np.bool_]
    own: NDArray[np.float64]  # the item's part of its fate


class Items:
    """The items of one set (gate or report): two accuracy benchmarks of `size` items each, and texts."""

    def __init__(self, rng: np.random.Generator, size: int, documents: int = 400) -> None:
        self._quizzes = [
            _Quiz(name, scorer, rng.random(size) < accuracy, rng.standard_normal(size))
            for name, scorer, accuracy in ACCURACIES
        ]
        self._tokens = np.full(documents, TOKENS)
        self._nats = TOKENS * rng.normal(2.5, 0.4, documents)

    def sense(self, drop: float, rng: np.random.Generator) -> tuple[SensedBenchmark, ...]:
        """Scores of a model whose true relative drop is `drop`."""
        found = [self._answer(quiz, drop, rng) for quiz in self._quizzes]
        rise = NLL_PER_DROP * drop + rng.normal(0.0, SPREAD, self._tokens.size)
        text = SensedBenchmark(
            name="text",
            benchmark_version_id="text-1",
            scorer=Scorer.NLL,
            weight=1.0,
            max_drop=None,
            baseline=self._nats,
            current=self._nats + self._tokens * rise,
            baseline_tokens=self._tokens,
        )
        return (*found, text)

    def _answer(self, quiz: _Quiz, drop: float, rng: np.random.Generator) -> SensedBenchmark:
        share = float(np.mean(quiz.right))
        lost = min(max(CHURN / 2 / share + drop, 0.0), 1.0)
        gained = CHURN / 2 / (1.0 - share) + max(-drop - CHURN / 2 / share, 0.0)
        fate = np.sqrt(KINSHIP) * quiz.own + np.sqrt(1 - KINSHIP) * rng.standard_normal(
            quiz.own.size
        )
        flips = fate < np.where(quiz.right, special.ndtri(lost), special.ndtri(gained))
        return SensedBenchmark(
            name=quiz.name,
            benchmark_version_id=f"{quiz.name}-1",
            scorer=quiz.scorer,
            weight=1.0,
            max_drop=None,
            baseline=quiz.right.astype(np.float32),
            current=(quiz.right ^ flips).astype(np.float32),
        )
