"""The page of the tables."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from tests.benchmarks.controllers.activation import MOST_RAISES, RANGE, Summary
from tests.benchmarks.controllers.evidence import CHURN
from tests.benchmarks.controllers.figures import GOAL_GAP, GOAL_HELD, Figures, Fixed, Interval
from tests.benchmarks.controllers.plants import HOPELESS, Plant
from tests.benchmarks.controllers.runs import GATE_ITEMS, LOOKS, REPORT_ITEMS

HEAD: Final = (
    "controller",
    "held %",
    "domain gap, points",
    "held within a point %",
    "goal",
    "could not hold %",
    "raises",
    "reversals",
    "> 2 reversals %",
    "looks",
)


class Row(NamedTuple):
    """One contender on one plant."""

    contender: str
    is_ours: bool
    figures: Figures


class Block(NamedTuple):
    """All contenders on one plant."""

    plant: Plant
    best: Fixed | None
    rows: tuple[Row, ...]


def write_page(
    blocks: Sequence[Block],
    activations: Sequence[tuple[str, Summary]],
    *,
    command: str,
    seconds: float,
) -> str:
    """The page in Markdown."""
    n = blocks[0].rows[0].figures.n
    parts = [
        "# Controllers on simulated plants",
        "",
        f"Written by `{command}` in {seconds:.0f} s of CPU time in all; equal seeds give equal tables.",
        "",
        "A plant says how the true general drop and the domain accuracy answer to strength and learning rate;"
        " `tests/benchmarks/controllers/plants.py` holds their numbers. They are made up, not fitted to a"
        " training: what the tables show is how the controllers steer, not how much a model forgets. Every"
        f" look draws item outcomes ({GATE_ITEMS:,} items for each of two accuracy benchmarks and 400 texts,"
        f" {CHURN:.0%} of the items answered otherwise by an undamaged model), reads them with the real sensor"
        " and asks the real `decide()`; rollbacks, repairs, early stopping and the choice of the checkpoint are"
        f" the product's, at the default policy. A job has {LOOKS} accepted intervals, {n} jobs a row.",
        "",
        "- *held*: a version is published and every estimate on its report set"
        f" ({REPORT_ITEMS:,} items a benchmark, never seen before) is within its limit.",
        "- *domain gap*: true domain accuracy under the best fixed strength, mean with its 95 % interval;"
        " below zero where the limit was overstepped. The best fixed strength is found by a sweep of 120"
        " strengths from a 32nd of the default to 939 times it, noise-free and to the end.",
        f"- *goal*: held in at least {GOAL_HELD:.0%} of the jobs and the gap's upper bound at most"
        f" {100 * GOAL_GAP:g} point. *held within a point*: the share of single jobs, Clopper-Pearson 95 %.",
        "- *random*: log-uniform over the sweep's range, anew at every look.",
        "- The constants of `dual` (aim, dead zone, when it waits) were chosen while looking at these plants, under"
        " other seeds than the tables'. The plants themselves, the range of the random contender and how stubborn"
        " *step noise* is were settled then, too: drawn between what was asked and the cap, the random contender"
        " is centred on what *far* needs and came within a point there in 8 of 10 jobs.",
        "- The shrinking of the result toward the base after a refuted report is left out: how much of what was"
        " learned it costs would be an assumption.",
        "",
        *_verdicts(blocks),
    ]
    for block in blocks:
        parts += ["", *_table(block)]
    parts += ["", *_activations(activations), ""]
    return "\n".join(parts)


def _verdicts(blocks: Sequence[Block]) -> list[str]:
    """For every contender the plants on which it meets the goal."""
    judged = [block for block in blocks if block.best is not None]
    lines = [
        "## Who meets the goal",
        "",
        "| controller | plants | meets the goal on |",
        "|---|---|---|",
    ]
    for place, row in enumerate(blocks[0].rows):
        met = [b.plant.name for b in judged if b.rows[place].figures.meets_goal]
        lines.append(
            f"| {row.contender} | {len(met)} of {len(judged)} | {', '.join(met) or 'none'} |"
        )
    return lines


def _table(block: Block) -> list[str]:
    plant, best = block.plant, block.best
    if best is None:
        told = "no fixed strength holds"
    else:
        told = f"best fixed strength {best.strength:.3g}, domain accuracy {best.accuracy:.1%}"
    lines = [
        f"## {plant.name}: {plant.about}",
        "",
        f"Smallest sufficient strength {100 * plant.needs:.3g}; {told}."
        if plant.free and plant not in HOPELESS
        else f"{told.capitalize()}.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
    ]
    return [*lines, *(_line(row) for row in block.rows)]


def _line(row: Row) -> str:
    figures = row.figures
    goal = "-" if figures.gap is None else "met" if figures.meets_goal else "missed"
    cells = (
        f"**{row.contender}**" if row.is_ours else row.contender,
        _percent(figures.held),
        "-" if figures.gap is None else _points(figures.gap),
        "-" if figures.met is None else _percent(figures.met),
        goal,
        f"{figures.could_not_hold:.0%}",
        f"{figures.raises:.1f}",
        f"{figures.reversals:.1f}",
        f"{figures.turned_often:.0%}",
        f"{figures.looks:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _points(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.value:.1f} [{low:.1f}, {high:.1f}]"


def _activations(activations: Sequence[tuple[str, Summary]]) -> list[str]:
    low, high = RANGE
    lines = [
        "## Activation",
        "",
        "An armed strategy, inactive until the first confirmed drop, then at its default. Plants are drawn by"
        f" seed: needed strength {low:g} to {high:g} times the default (log-uniform), settled drop without it"
        " 6 to 15 %, steepness 0.7 to 1.5, 40 to 90 % of the way a look, delay 0 or 1 look. A *holding*"
        " evaluation has every estimate within its limit; decisions after activation that raise the strength"
        " count as raises, rollbacks among them.",
        "",
        f"| controller | regressions | holding in <= {MOST_RAISES} raises % | and never regressed again %"
        " | looks to it, mean |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| **{name}** | {found.n} | {_percent(found.few_raises)} | {_percent(found.kept)}"
        f" | {found.mean_looks:.1f} |"
        for name, found in activations
    ]
