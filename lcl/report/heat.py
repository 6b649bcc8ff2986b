"""The loss matrix as a heat map: alone, and below the held-out curves in the one-picture summary.

Colours compare within a column: domains have losses of their own height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.evals.loss_matrix import LossMatrix
from lcl.report import plots
from lcl.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_matrix(matrix: LossMatrix, theme: plots.Theme, title: str = "") -> Figure:
    """The loss matrix as a heat map; each column has its own scale, since domains differ."""
    plt = plots.pyplot()
    rows, columns = matrix.values.shape
    figure = plt.figure(
        figsize=(1.7 + 1.05 * columns, 0.9 + 0.42 * rows), layout="constrained", dpi=150
    )
    figure.set_facecolor(theme.paper)
    _heat(figure.add_subplot(), matrix, theme, title)
    return figure


def draw_summary(runs: Sequence[Run], theme: plots.Theme = plots.LIGHT) -> Figure:
    """One picture of it all: held-out curves above, loss matrices below; for a README or a talk."""
    plt = plots.pyplot()
    runs = list(runs)[:2]
    unit = plots.common_unit(runs)
    figure = plt.figure(figsize=(10.4, 6.4), layout="constrained", dpi=100)
    figure.set_facecolor(theme.paper)
    grid = figure.add_gridspec(2, len(runs), height_ratios=(1.25, 1))
    top: Any = None
    panels: list[Any] = []
    for column, run in enumerate(runs):
        axes = figure.add_subplot(grid[0, column], sharey=top)
        top = top or axes
        plots.stage_bands(axes, run, theme, width=6.4 / len(runs))
        ends = []
        for index, domain in enumerate(run.domains):
            steps, values = run.heldout(domain, unit)
            if len(steps):
                axes.plot(steps, values, **plots.stroke(theme, index))
                ends.append(
                    (float(steps[-1]), float(values[-1]), domain, plots.colour(theme, index))
                )
        if column == len(runs) - 1:
            plots.loss_scale(top)
        panels.append((axes, run, ends))
        axes.set_title(
            run.name, color=theme.ink, fontsize=11, fontweight="bold", loc="left", pad=16
        )
        matrix = run.loss_matrix(unit)
        forgot = matrix.mean_forgetting
        said = "" if forgot is None else f"mean forgetting {forgot:+.3f} {matrix.unit}"
        _heat(figure.add_subplot(grid[1, column]), matrix, theme, said)
    for column, (axes, run, ends) in enumerate(panels):  # The shared scale is known only now.
        plots.finish(axes, theme, ends, run, ylabel=plots.UNIT_LABELS[unit] if column == 0 else "")
    return figure


def shares(matrix: LossMatrix) -> np.ndarray:
    """[T+1, D] in 0..1: 1 = the column's lowest loss, 0 = its highest; NaN where not measured."""
    low = np.nanmin(_nan_safe(matrix.values), axis=0)
    high = np.nanmax(_nan_safe(matrix.values), axis=0)
    return np.where(high > low, (high - matrix.values) / np.where(high > low, high - low, 1), 0.5)


def _nan_safe(values: np.ndarray) -> np.ndarray:
    """A column of NaN only would warn: it becomes zeros, and its cells stay NaN in `shares`."""
    return np.where(np.isnan(values).all(axis=0), 0.0, values)


def _heat(axes: Axes, matrix: LossMatrix, theme: plots.Theme, title: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    map_ = LinearSegmentedColormap.from_list("loss", [theme.band, theme.accent])
    part = shares(matrix)
    axes.imshow(part * 0.72, cmap=map_, vmin=0, vmax=1, aspect="auto")
    rows, columns = matrix.values.shape
    for place in range(1, rows):
        axes.axhline(place - 0.5, color=theme.paper, linewidth=2)
    for place in range(1, columns):
        axes.axvline(place - 0.5, color=theme.paper, linewidth=2)
    for (i, j), value in np.ndenumerate(matrix.values):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", color=theme.ink, fontsize=8.5)
        if matrix.home_stage[matrix.domains[j]] == i:
            axes.add_patch(
                Rectangle((j - 0.46, i - 0.42), 0.92, 0.84, fill=False, ec=theme.ink, lw=1.2)
            )
    names = [d + ("\n(not trained)" if d in matrix.never_trained else "") for d in matrix.domains]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    after = ["start", *(f"after {s}" for s in matrix.stages)]
    axes.set_yticks(range(rows), after, fontsize=8)
    axes.tick_params(length=0, colors=theme.soft)
    axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_xlabel(title, color=theme.soft, fontsize=8.5)
