"""The figures of the papers' tables: a dot a seed, the mean, its interval; and loss curves.

Matplotlib is imported when one is drawn. `save` writes PNG and SVG of the same figure, whole.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lcl import files
from lcl.papers.claims import Values, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, stem: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes STEM.png and STEM.svg; the same data gives the same bytes."""
    from lcl.report import plots

    path = pathlib.Path(stem)
    drawn = {path.with_suffix(kind): io.BytesIO() for kind in (".png", ".svg")}
    plots.save(figure, *drawn.values())
    for place, image in drawn.items():
        files.write_whole(place, image.getvalue())
    png, svg = drawn
    return png, svg


def bars(
    panels: Sequence[tuple[str, str]],
    values: Values,
    reference: float | None = None,
    label: str = "nats/token, lower is better",
) -> Figure:
    """Arms by metric: one panel a metric, a dot a seed, the mean and its 95% interval.

    Args:
      panels: (metric, title) of each panel.
      values: arm -> seed -> metric -> value; an arm without the metric is left out of its panel.
      reference: a dashed line across, such as the loss of knowing nothing.
      label: what the numbers are, under all panels.
    """
    from matplotlib.figure import Figure

    from lcl.report.plots import LIGHT, colour

    figure = Figure(figsize=(3.5 * len(panels) + 1.2, 0.42 * len(values) + 1.3), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for column, (metric, title) in enumerate(panels):
        panel = axes[column]
        arms = list(values)
        for place, arm in enumerate(arms):
            found = [one[metric] for one in values[arm].values() if metric in one]
            if not found:
                continue
            shade = colour(LIGHT, place)
            mean = interval(found)
            panel.plot(found, [place] * len(found), "o", color=shade, markersize=3.5, alpha=0.55)
            half = mean.half if len(found) > 1 else 0.0
            panel.errorbar(
                [mean.mean], [place], xerr=[half], fmt="|", color=shade, markersize=13, capsize=3
            )
        if reference is not None:
            panel.axvline(reference, color=LIGHT.soft, linestyle=(0, (4, 3)), linewidth=0.8)
        panel.set_title(title, fontsize=9, loc="left", color=LIGHT.ink)
        panel.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms), fontsize=8)
        panel.set_ylim(len(arms) - 0.4, -0.6)
        panel.tick_params(labelsize=8, colors=LIGHT.soft)
        panel.grid(axis="x", color=LIGHT.line, linewidth=0.5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.supxlabel(label, fontsize=8.5, color=LIGHT.soft)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    dots: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> Figure:
    """Lines (what a law says) and dots (what was measured); a name in both has one colour.

    Args:
      lines, dots: name -> (x, y).
      xlabel, ylabel: of the axes.
      log_x: whether x is on a logarithmic scale.
    """
    from matplotlib.figure import Figure

    from lcl.report.plots import LIGHT, colour

    figure = Figure(figsize=(6.4, 4.0), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for place, name in enumerate(dict.fromkeys([*lines, *dots])):
        shade = colour(LIGHT, place)
        if name in lines:
            axes.plot(*lines[name], color=shade, linewidth=1.6)
        if name in dots:
            axes.plot(*dots[name], "o", color=shade, markersize=4)
        axes.plot([], [], "-o", color=shade, markersize=4, label=name)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel, fontsize=8.5, color=LIGHT.soft)
    axes.set_ylabel(ylabel, fontsize=8.5, color=LIGHT.soft)
    axes.tick_params(labelsize=8, colors=LIGHT.soft)
    axes.grid(color=LIGHT.line, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False, labelcolor=LIGHT.ink)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
