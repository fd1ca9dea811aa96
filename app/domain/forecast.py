"""How long a run still takes, from what it has measured of itself and from nothing else."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

RECENT_STEPS: Final = 50  # so that a machine that slows down shows within so many steps
RECENT_EVALUATIONS: Final = 5
MIN_STEPS: Final = 3  # measured before anything is said; the first step, a warm-up, is not measured
TRAINING: Final = "training"
EVALUATING: Final = frozenset({"evaluating", "diagnosis"})


@dataclass(frozen=True, slots=True)
class Scoring:
    """Seconds that scoring takes by the items' measured speed; 0 where nothing is watched."""

    gate: float = 0.0  # of one evaluation
    report: float = 0.0  # of the final test
    frontier: tuple[float, ...] = ()  # of each point


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a run stood at a moment."""

    moment: float  # seconds on a clock that never goes back
    phase: str
    step: int


class Forecast:
    """What an attempt has shown of its pace. It is shown every step and every change of phase.

    Attributes:
        validation_seconds: Of the last pass over the validation rows.
    """

    def __init__(self) -> None:
        self.validation_seconds = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._evaluations: deque[float] = deque(maxlen=RECENT_EVALUATIONS)
        self._last: Seen | None = None
        self._is_warm = False
        self._evaluating_since: float | None = None
        self._has_trained = True  # since the last evaluation
        self._is_ending = False
        self._points = -1  # of the frontier; it is shown once before the first

    def see(self, seen: Seen) -> None:
        """Takes note of where the run stands."""
        last, self._last = self._last, seen
        if seen.phase == "frontier":
            self._points += 1
        if seen.phase in EVALUATING:
            if self._evaluating_since is None:
                # Two evaluations without a step between them: the second one is the final test.
                self._is_ending = not self._has_trained
                self._evaluating_since = seen.moment
            return
        if self._evaluating_since is not None:
            if not self._is_ending:
                self._evaluations.append(seen.moment - self._evaluating_since)
            self._evaluating_since, self._has_trained = None, False
        if last is None or seen.phase != TRAINING or last.phase != TRAINING:
            return
        if seen.step == last.step + 1:
            if self._is_warm:
                self._steps.append(seen.moment - last.moment)
            self._is_warm = self._has_trained = True
            self._is_ending = False

    def seconds_left(self, steps: int, evaluations: int, scoring: Scoring) -> float | None:
        """Seconds to the end as of the last look; None until enough has been measured.

        Args:
            steps: That are left.
            evaluations: That come after the one under way, if one is.
            scoring: What scoring costs.
        """
        if self._last is None or len(self._steps) < MIN_STEPS:
            return None
        phase = self._last.phase
        # What an evaluation takes beside scoring: validation, and a checkpoint as long to write as an artifact.
        beside = max(self._evaluation(scoring) - scoring.gate, 0.0)
        points = sum(scoring.frontier[max(self._points, 0) :])
        points += self.validation_seconds * len(scoring.frontier[max(self._points, 0) :])
        if phase == "exporting":
            return beside
        if phase == "frontier":
            return points + beside
        end = scoring.report + points + 2 * beside
        if self._is_ending:
            return end
        evaluations += phase in EVALUATING
        pace = sum(self._steps) / len(self._steps)
        return steps * pace + evaluations * self._evaluation(scoring) + end

    def _evaluation(self, scoring: Scoring) -> float:
        if not self._evaluations:
            return scoring.gate + self.validation_seconds
        return sum(self._evaluations) / len(self._evaluations)


def count_evaluations(step: int, total: int, interval: int, others: Iterable[int]) -> int:
    """Evaluation points after a step: by the calendar, and the ends of stages; an interval of 0 has none."""
    calendar = set(range(interval, total + 1, interval)) if interval > 0 else set()
    return sum(point > step for point in calendar | set(others) | {total})
