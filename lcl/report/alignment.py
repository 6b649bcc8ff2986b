"""Gradient alignment on the page: do the new and the replayed tokens of a run pull the same way?

Read from the lines of metrics.jsonl that hold "gradient_cosine" and "gradient_cosine/layer_NN",
which `lcl.analysis.GradientAlignment` writes (and A-GEM the first of them, beside
"gradient_projected": 1 where it changed the gradient).
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.report import page, plots
from lcl.report.figures import put_figure
from lcl.report.read import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "gradient_cosine"
_MANY = 12  # layers: more of them are folded away, and only the first and the last are named


def cosines(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"whole" or "layer 3": (steps int64[N], cosines float64[N])}, the whole first; {} for none.

    A step that had no number is left out.
    """
    keys = {key for line in run.metrics for key in line if key.startswith(f"{KEY}/layer_")}
    found = {"whole": run.series(KEY)}
    for key in sorted(keys, key=lambda key: (len(key), key)):
        number = key.rpartition("_")[2]
        found[f"layer {int(number) if number.isdecimal() else number}"] = run.series(key)
    return {name: series for name, series in found.items() if len(series[0])}


def draw_alignment(run: Run, theme: plots.Theme, narrow: bool = False) -> Figure:
    """The cosine over the run, whole (strong) and by layer (the deeper the stronger)."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    figure, (axes,) = plots.new_figure(theme, 1, narrow=narrow)
    plots.stage_bands(axes, run, theme, width=2.6 if narrow else 7.4)
    shades = LinearSegmentedColormap.from_list("depth", [theme.line, theme.accent])
    series = cosines(run)
    layers = [name for name in series if name != "whole"]
    ends = []
    dots = 1.6 if narrow else 2.6
    for name, (steps, values) in series.items():
        if name == "whole":
            style: dict[str, Any] = {"color": theme.ink, "linewidth": 2.0, "zorder": 4}
        else:
            depth = (layers.index(name) + 1) / len(layers)
            shade = to_hex(shades(0.25 + 0.75 * depth))
            style = {"color": shade, "linewidth": 1.1, "zorder": 3}
        for where in plots.pieces(steps):  # A stage without replay has no cosine to join up.
            x, y = plots.smooth(steps[where], values[where])
            axes.plot(x, y, **style, marker="o" if len(x) < 60 else "", markersize=dots)
        if name == "whole" or len(layers) <= _MANY // 2 or name in (layers[0], layers[-1]):
            ends.append((float(steps[-1]), float(y[-1]), name, style["color"]))
    axes.axhline(0, color=theme.soft, linewidth=0.8, zorder=2)
    axes.margins(y=0.1)
    plots.finish(axes, theme, ends, run, ylabel="cosine of new and replayed gradients")
    return figure


def alignment_section(run: Run, folder: Path, prefix: str = "") -> list[str]:
    """Heading, figure and a table of the last values, as HTML; [] where the run did not look.

    Args:
        run: the run.
        folder: where the page lies; the figure's files are written there.
        prefix: of the files' names.
    """
    series = cosines(run)
    if not series:
        return []
    steps, values = next(iter(series.values()))
    often = _often(steps)
    first = next(iter(series))
    alt = (
        f"Cosine between the gradients of new and replayed tokens, {first}: first "
        f"{values[0]:+.2f}, mean {values.mean():+.2f}, last {values[-1]:+.2f} at step {steps[-1]}."
    )
    caption = (
        "Cosine between the gradients of the new and of the replayed tokens of one batch, before "
        "the update: 1 = one step serves both; below 0 = they work against each other. "
        f"{often} Steps without replayed tokens have none.{_projected(run)}"
    )
    rows = [
        (name, [f"{int(s[-1]):,}", *(f"{x:+.3f}" for x in (v[-1], v.mean(), v.min()))])
        for name, (s, v) in series.items()
    ]
    head = ["", "last step", "cosine there", "mean of all", "lowest"]
    title = "Cosine of new and replayed gradients, at the last look and over all of them."
    parts = [
        "<h2>Do new and replayed text pull the same way?</h2>",
        put_figure(
            folder,
            f"{prefix}alignment",
            lambda theme, narrow: draw_alignment(run, theme, narrow),
            alt,
            caption,
        ),
    ]
    if len(rows) > _MANY:
        return [
            *parts,
            page.table(title, head, rows[:1]),
            f"<details><summary>{escape(f'By layer ({len(rows) - 1})')}</summary>"
            f"{page.table(title, head, rows[1:])}</details>",
        ]
    return [*parts, page.table(title, head, rows)]


def _projected(run: Run) -> str:
    """A sentence on how often A-GEM turned the gradient; nothing for a run without it."""
    _, changed = run.series("gradient_projected")
    if not len(changed):
        return ""
    return f" A-GEM changed the gradient at {changed.mean():.0%} of the {len(changed):,} logged."


def _often(steps: np.ndarray) -> str:
    """How often one looked: the usual distance, as looks without replay leave gaps."""
    if len(steps) < 2:
        return "Looked at once."
    return f"Looked at every {int(np.median(np.diff(steps)))} steps."
