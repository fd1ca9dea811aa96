"""Loss surfaces as one picture: contour panels side by side on a common scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.evaluation.landscape import Surface

NUM_LEVELS = 16
SPAN_QUANTILE = (
    0.9  # the colours end where a tenth of the points is higher: peaks would flatten the rest
)
INK = "#22303c"


def draw_surfaces(surfaces: Sequence[Surface], path: Path) -> None:
    """Writes a PNG of the surfaces, each with its centre, its loss there and its sharpness."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = contour_levels(surfaces)
    figure = Figure(figsize=(4.1 * len(surfaces) + 1.1, 4.9), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(surfaces), sharex=True, sharey=True, squeeze=False)[0]
    drawn = [_draw_panel(panel, s, levels) for s, panel in zip(surfaces, panels, strict=True)]
    panels[0].set_ylabel("second direction: random, filter-normalised", color=INK)
    bar = figure.colorbar(drawn[0], ax=list(panels), shrink=0.86, pad=0.02, aspect=26)
    bar.set_label("loss, nats per token", color=INK)
    ticks = levels[:: max(len(levels) // 6, 1)].tolist()
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def contour_levels(surfaces: Sequence[Surface]) -> NDArray[np.float64]:
    """Losses at which contours are drawn, the same for all: closer together near the lowest.

    Points that are no number or lie above most others are left to the last colour.
    """
    values = np.concatenate([np.asarray(s.loss).ravel() for s in surfaces])
    values = values[np.isfinite(values)]
    low = float(values.min()) if values.size else 0.0
    high = float(np.quantile(values, SPAN_QUANTILE)) if values.size else 1.0
    high = max(high, low + 1e-6 * max(abs(low), 1.0))
    steps: NDArray[np.float64] = np.linspace(0.0, 1.0, NUM_LEVELS)
    return low + (high - low) * steps**2


def _draw_panel(panel: Any, surface: Surface, levels: NDArray[np.float64]) -> Any:  # noqa: ANN401 - matplotlib's own types
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    across, along = np.meshgrid(surface.second_axis, surface.first_axis)
    values = np.asarray(surface.loss)
    values = np.where(np.isfinite(values), values, 10 * levels[-1] + 1)
    norm = BoundaryNorm(levels, 256, extend="max")
    filled = panel.contourf(along, across, values, levels, norm=norm, cmap="viridis", extend="max")
    panel.contour(along, across, values, levels, colors="white", linewidths=0.5, alpha=0.55)
    panel.plot(0, 0, marker="P", markersize=10, color="white", markeredgecolor=INK, zorder=5)
    panel.set_title(surface.name, fontsize=13, fontweight="bold", color=INK, pad=22)
    measured = surface.sharpness
    caption = (
        f"loss {surface.center_loss:.3f}    sharpness {measured.value:.3g}"
        f" at {100 * measured.relative_radius:g} %"
    )
    panel.text(0.5, 1.025, caption, transform=panel.transAxes, ha="center", fontsize=9, color=INK)
    panel.set_xlabel(f"first direction: {surface.first_direction}", color=INK)
    panel.set_aspect("equal")
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.tick_params(length=0, pad=5, labelsize=8, colors=INK)
    for spine in panel.spines.values():
        spine.set_visible(False)
    return filled
