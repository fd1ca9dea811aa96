"""What the figures say, in words: targets met or not, and where a strategy does not help."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.board.bootstrap import Estimate
from tests.benchmarks.board.figures import Figures
from tests.benchmarks.board.standing import Board, Row
from tests.benchmarks.board.table import PLAIN

LESS_LEARNT = 0.10  # points of domain accuracy below plain that count as over-regularised
MEAN_DECAY, WORST_DECAY, OF_PLAIN = 0.01, 0.02, 0.98
ADAPTER_MEMORY = 0.70
CACHED_TIME, DATA_FREE_TIME = 1.10, 1.20
ADAPTER_ROWS = ("domain_adapters", "plain LoRA", "oracle-routed adapters")


@dataclass(frozen=True)
class Target:
    """A figure that was asked for, beside ours."""

    name: str
    wanted: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A method beside plain training at the same accuracy on one domain.

    `plain_drop` is None where plain never reaches that accuracy at any rate or length that was tried.
    """

    plain_drop: float | None
    verdict: str


def plain_points(board: Board) -> list[tuple[float, float]]:
    """(accuracy, drop of exact match on unseen skills) of plain training at every rate and length, one domain."""
    rows = board.measured("curve") + [
        r for r in board.measured("control") if r.method.name == PLAIN
    ]
    return sorted((f.single_domain.value, f.single_em_drop.value) for r in rows if (f := r.figures))


def drop_at(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The least drop at which plain training reaches an accuracy, points joined by lines; None if none does."""
    if not points or accuracy > points[-1][0]:
        return None
    found = [drop for reached, drop in points if reached >= accuracy]
    for (low, low_drop), (high, high_drop) in itertools.pairwise(points):
        if low <= accuracy <= high and high > low:
            share = (accuracy - low) / (high - low)
            found.append(low_drop + share * (high_drop - low_drop))
    return min(found)


def compare(board: Board, figures: Figures) -> Comparison:
    """Whether a method keeps more than plain training that learns as much, by its interval."""
    plain = board.find(PLAIN)
    assert plain is not None
    assert plain.figures is not None
    accuracy, drop = figures.single_domain.value, figures.single_em_drop
    matched = drop_at(plain_points(board), accuracy)
    if plain.figures.single_domain.value - accuracy > LESS_LEARNT:
        return Comparison(matched, "learns too little")
    against = plain.figures.single_em_drop.value if matched is None else matched
    if drop.high < against:
        return Comparison(matched, "helps")
    if drop.low > against:
        return Comparison(matched, "keeps less than plain")
    return Comparison(matched, "no clear difference")


def merit(figures: Figures) -> float:
    """What ranks methods: harmonic mean of final domain accuracy and of what the unseen skills have kept."""
    kept = max(1.0 - figures.decay_last.value, 0.0)
    return 2 * figures.final_domain.value * kept / max(figures.final_domain.value + kept, 1e-9)


def best_combination(board: Board) -> Row | None:
    """The combination with the most targets of the sequence met by value, then of the highest merit."""
    rows = board.measured("combination")
    return max(rows, key=lambda r: (_num_met(r.figures), _merit(r)), default=None)


def _merit(row: Row) -> float:
    return 0.0 if row.figures is None else merit(row.figures)


def _num_met(figures: Figures | None) -> int:
    if figures is None:
        return 0
    return (
        (figures.decay_mean.value < MEAN_DECAY)
        + (figures.decay_worst.value < WORST_DECAY)
        + (figures.of_plain_learning.value >= OF_PLAIN)
    )


def targets(board: Board) -> list[Target]:
    """The targets of the sequence for the best combination, and those of cost."""
    found: list[Target] = []
    best = best_combination(board)
    if best is not None and best.figures is not None:
        name, f = best.method.name, best.figures
        found += [
            _below(
                f"{name}: decay of unseen skills, mean over the domains", f.decay_mean, MEAN_DECAY
            ),
            _below(f"{name}: the same, after the worst domain", f.decay_worst, WORST_DECAY),
            _at_least(
                f"{name}: final domain accuracy, of plain's just after each domain",
                f.of_plain_learning,
                OF_PLAIN,
            ),
            _at_least(
                f"{name}: the same, of plain's own final accuracy", f.of_plain_final, OF_PLAIN
            ),
            _below(
                f"{name}: earlier domains' loss, mean (a stricter reading)", f.lost_mean, MEAN_DECAY
            ),
            _below(
                f"{name}: earlier domains' loss, worst (a stricter reading)",
                f.lost_worst,
                WORST_DECAY,
            ),
        ]
    for row_name in ADAPTER_ROWS:
        found += _cost(
            board, row_name, "memory_ratio", ADAPTER_MEMORY, "weights, gradients, optimiser"
        )
    found += _cost(board, "distillation (cached top k)", "time_ratio", CACHED_TIME, "time")
    found += _cost(
        board, "distillation (domain rows, every 4)", "time_ratio", DATA_FREE_TIME, "time"
    )
    return found


def _cost(board: Board, name: str, field: str, limit: float, what: str) -> list[Target]:
    row = board.find(name)
    if row is None or row.figures is None:
        return []
    value = float(getattr(row.figures, field))
    verdict = "pass" if value <= limit else "FAIL"
    return [Target(f"{name}: {what}, of plain's", f"<= {limit:.2f}", f"{value:.2f}", verdict)]


def _below(name: str, ours: Estimate, limit: float) -> Target:
    verdict = "pass" if ours.high < limit else "met, not proven" if ours.value < limit else "FAIL"
    return Target(name, f"< {100 * limit:g} %", f"{ours.shown()} %", verdict)


def _at_least(name: str, ours: Estimate, limit: float) -> Target:
    verdict = "pass" if ours.low >= limit else "met, not proven" if ours.value >= limit else "FAIL"
    return Target(name, f">= {100 * limit:g} %", f"{ours.shown()} %", verdict)


def findings(board: Board) -> list[str]:
    """Sentences that follow from the numbers alone."""
    plain = board.find(PLAIN)
    if plain is None or plain.figures is None:
        return ["Plain training has not been run on all seeds yet, so nothing can be compared."]
    p = plain.figures
    said = [
        f"Plain training reaches {100 * p.single_domain.value:.0f} % on one domain and loses"
        f" {p.single_em_drop.shown()} points of exact match on unseen skills, {p.single_mc_drop.shown()} of"
        f" multiple choice; over {board.num_stages} domains it ends at {100 * p.final_domain.value:.0f} % on"
        f" them and has lost {p.decay_last.shown()} % of the unseen skills."
    ]
    rows = board.measured("strategy", "combination")
    verdicts = {row.method.name: compare(board, row.figures) for row in rows if row.figures}
    for verdict, text in (
        (
            "helps",
            "Keep more of the unseen skills than plain training at the same accuracy (one domain)",
        ),
        ("no clear difference", "Show no clear difference to plain training at the same accuracy"),
        (
            "keeps less than plain",
            "Keep less than plain training at the same accuracy: they do not help",
        ),
        (
            "learns too little",
            f"Learn over {100 * LESS_LEARNT:.0f} points less than plain: too costly here",
        ),
    ):
        names = [name for name, found in verdicts.items() if found.verdict == verdict]
        if names:
            said.append(f"{text}: {', '.join(names)}.")
    said += _about_sequences(board, rows, p)
    return said


def _about_sequences(board: Board, rows: Sequence[Row], plain: Figures) -> list[str]:
    said = []
    for general in (True, False):
        own = [row for row in rows if row.general_rows is general and row.figures]
        if own:
            best = max(own, key=_merit)
            figures = best.figures
            assert figures is not None
            kind = "with" if general else "without"
            said.append(
                f"Best {kind} general rows over {board.num_stages} domains: {best.method.name}, final domain"
                f" accuracy {figures.final_domain.shown()} %, decay of unseen skills"
                f" {figures.decay_last.shown()} % at the end."
            )
    forgetful = [
        row.method.name
        for row in rows
        if row.figures and row.figures.final_domain.low <= plain.final_domain.value
    ]
    if forgetful:
        said.append(
            "Are not clearly better than plain on the domains at the end of the sequence (they protect general"
            f" skills at most, not earlier domains): {', '.join(forgetful)}."
        )
    worse = [
        row.method.name
        for row in rows
        if row.figures
        and row.figures.single_em_drop.value - row.figures.single_seen_drop.value > 0.05
    ]
    if worse:
        said.append(
            "Protect the seen skills over 5 points better than the unseen ones, so their figures on seen skills"
            f" flatter them: {', '.join(worse)}."
        )
    return said
