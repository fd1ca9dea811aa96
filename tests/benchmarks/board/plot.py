"""BOARD.png: what is kept of the unseen skills against domain accuracy, and what it costs."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.board.bootstrap import Estimate
from tests.benchmarks.board.standing import Board, Row

COLOURS = {"with": "#1f6f8b", "without": "#c8553d", "control": "#555555", "curve": "#aaaaaa"}
MARKERS = {"strategy": "o", "combination": "s", "control": "^", "curve": "."}


def draw(board: Board, path: Path) -> None:
    """Two panels, one domain and the sequence, numbered points, and a key of the numbers."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = board.measured("strategy", "combination", "control", "curve")
    named = [row for row in rows if row.method.group != "curve"]
    numbers = {row.method.name: number for number, row in enumerate(named, 1)}
    figure: Any = plt.figure(figsize=(15, 8.5), layout="constrained")
    left, right, key = figure.subplots(1, 3, width_ratios=(1, 1, 0.62))
    _panel(left, rows, numbers, is_single=True)
    _panel(right, rows, numbers, is_single=False)
    right.set_title(f"{board.num_stages} domains in a row, at the end")
    _key(key, named, numbers)
    figure.suptitle(
        f"Retention against domain accuracy: exact match, {len(board.seeds)} seeds, 95 % intervals"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def coordinates(row: Row, *, is_single: bool) -> tuple[Estimate, Estimate]:
    """Domain accuracy, and what is kept of the unseen skills, in percent."""
    figures = row.figures
    assert figures is not None
    if is_single:
        domain, lost = figures.single_domain, figures.single_em_drop
    else:
        domain, lost = figures.final_domain, figures.decay_last
    kept = Estimate(1 - lost.value, 1 - lost.high, 1 - lost.low)
    return _percent(domain), _percent(kept)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats on both axes, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart as little as keeps their order and leaves `gap` between neighbours."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = sum(placed[i] - positions[i] for i in order) / max(len(order), 1)
    return [value - shift for value in placed]


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _colour(row: Row) -> str:
    if row.method.group in ("control", "curve"):
        return COLOURS[row.method.group]
    return COLOURS["with" if row.general_rows else "without"]


def _panel(axes: Any, rows: Sequence[Row], numbers: dict[str, int], *, is_single: bool) -> None:
    points = []
    for row in rows:
        x, y = coordinates(row, is_single=is_single)
        points.append((x.value, y.value))
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[max(x.value - x.low, 0)], [max(x.high - x.value, 0)]],
            yerr=[[max(y.value - y.low, 0)], [max(y.high - y.value, 0)]],
            fmt=MARKERS[row.method.group],
            color=_colour(row),
            elinewidth=0.6,
            alpha=0.75,
            markersize=6,
        )
    front = pareto(points)
    axes.plot(*zip(*front, strict=True), color="#222222", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(0, 101, 10))
    _labels(axes, rows, numbers, is_single=is_single)
    axes.set_xlabel("domain accuracy, %")
    axes.set_ylabel("kept of exact match on unseen skills, %")
    axes.set_title("one domain")
    axes.grid(alpha=0.2)


def _labels(axes: Any, rows: Sequence[Row], numbers: dict[str, int], *, is_single: bool) -> None:
    """Numbers in a column to the right, joined to their points, so that none covers another."""
    named = [row for row in rows if row.method.name in numbers]
    if not named:
        return
    spots = [coordinates(row, is_single=is_single) for row in named]
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    width = right - left
    axes.set_xlim(left, right + 0.2 * width)
    heights = spread([y.value for _, y in spots], (high - low) / 44)
    axes.set_ylim(min(low, *heights) - 1, max(high, *heights) + 1)
    for place, (row, (x, y), height) in enumerate(zip(named, spots, heights, strict=True)):
        column = right + width * (0.06 + 0.07 * (sorted(heights).index(heights[place]) % 2))
        axes.annotate(
            str(numbers[row.method.name]),
            (x.value, y.value),
            (column, height),
            fontsize=8,
            color=_colour(row),
            va="center",
            arrowprops={"arrowstyle": "-", "color": _colour(row), "lw": 0.35, "alpha": 0.5},
        )


def _key(axes: Any, named: Sequence[Row], numbers: dict[str, int]) -> None:
    """Names of the numbers with time and memory."""
    axes.axis("off")
    height = 1.0 / (len(named) + 5)
    axes.text(0, 1, "  no.  method (time, memory, of plain's)", fontsize=9, weight="bold", va="top")
    for line, row in enumerate(named, 2):
        f = row.figures
        assert f is not None
        text = f"{numbers[row.method.name]:>3}  {row.method.name} ({f.time_ratio:.1f}, {f.memory_ratio:.1f})"
        axes.text(0, 1 - line * height, text, fontsize=8, color=_colour(row), va="top")
    legend = (
        ("with general rows", COLOURS["with"]),
        ("without general rows", COLOURS["without"]),
        ("circles: strategies, squares: combinations, triangles: controls", COLOURS["control"]),
        ("small dots: plain training at other rates and lengths", COLOURS["curve"]),
    )
    for line, (text, colour) in enumerate(legend, len(named) + 2):
        axes.text(0, 1 - line * height, text, fontsize=8, color=colour, va="top", style="italic")
