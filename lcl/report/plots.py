"""Curves of runs, and what all figures share. Matplotlib is imported when one is drawn.

Each `draw_*` takes runs and a theme and returns a Figure; `save` writes it. Curves are labelled at
their ends rather than in a legend, colours are the Okabe-Ito set (told apart by colour-blind eyes),
and a domain has one colour in all figures of a page.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.report.read import Branch, Run, StageInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one scheme; `series` is the order in which domains (or runs) take theirs."""

    name: str
    paper: str
    ink: str
    soft: str
    line: str
    band: str
    accent: str
    series: tuple[str, ...]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1b1f24",
    soft="#5b6470",
    line="#d8dde3",
    band="#f4f6f8",
    accent="#0072b2",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6b4fa0", "#444444"),
)
DARK = Theme(
    name="dark",
    paper="#15191e",
    ink="#e8ebee",
    soft="#9aa4af",
    line="#333b44",
    band="#1b2027",
    accent="#5cb3e8",
    series=("#5cb3e8", "#ff9e4a", "#3ecf9c", "#eba4cc", "#f0d24a", "#9ad7ff", "#b79ff0", "#c8c8c8"),
)
THEMES = (LIGHT, DARK)
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.5)))
_MAX_POINTS = 240


def colour(theme: Theme, index: int) -> str:
    """The colour of the index-th domain or run."""
    return theme.series[index % len(theme.series)]


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal stretches of points, at most 240 of them: a curve one can see.

    >>> smooth(np.arange(4), np.array([1.0, 2.0, 3.0, 4.0]))[1].tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    if len(steps) <= _MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _MAX_POINTS + 1).astype(int)
    counts = np.diff(edges)
    means = np.add.reduceat(values, edges[:-1]) / counts
    return np.add.reduceat(steps.astype(float), edges[:-1]) / counts, means


def draw_heldout(run: Run, theme: Theme, unit: str, narrow: bool = False) -> Figure:
    """Held-out loss of every domain over the run, stage borders behind; `narrow` for a phone.

    A diamond is an annealed branch, joined by dots to the place where it left the run.
    """
    figure, (axes,) = new_figure(theme, 1, narrow=narrow)
    stage_bands(axes, run, theme, width=2.6 if narrow else 7.4)
    ends = []
    for index, domain in enumerate(run.domains):
        steps, values = run.heldout(domain, unit)
        if not len(steps):
            continue
        axes.plot(steps, values, **stroke(theme, index), marker="o", markersize=2.6)
        ends.append((float(steps[-1]), float(values[-1]), domain, colour(theme, index)))
    loss_scale(axes)
    for branch in run.branches:
        _mark_branch(axes, branch, run, theme, unit)
    finish(axes, theme, ends, run, ylabel=UNIT_LABELS[unit])
    return figure


def _mark_branch(axes: Axes, branch: Branch, run: Run, theme: Theme, unit: str) -> None:
    """A branch's losses, once the run itself has come as far: before, they lie off the axes."""
    if branch.step > run.steps_done:
        return
    # A straight line on a logarithmic axis is one between logarithms.
    log = axes.get_yscale() == "log"
    to_axis, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    for index, domain in enumerate(run.domains):
        value = branch.loss(domain, unit)
        steps, trunk = run.heldout(domain, unit)
        if value is None or not len(steps):
            continue
        shade = colour(theme, index)
        left = float(back(np.interp(branch.branch_from, steps, to_axis(trunk))))
        axes.plot(
            [branch.branch_from, branch.step], [left, value],
            color=shade, linewidth=1.0, linestyle=(0, (1, 1.2)), zorder=3,
        )  # fmt: skip
        axes.plot(
            branch.step, value, marker="D", markersize=4.6, color=theme.paper,
            markeredgecolor=shade, markeredgewidth=1.3, linestyle="none", zorder=4, clip_on=False,
        )  # fmt: skip


def draw_training(run: Run, theme: Theme, narrow: bool = False) -> Figure:
    """Training loss by domain (replayed rows dashed) above the learning rate."""
    figure, (loss, rate) = new_figure(theme, 2, narrow=narrow)
    stage_bands(loss, run, theme, width=2.6 if narrow else 7.4)
    stage_bands(rate, run, theme, names=False)
    ends = []
    order = list(run.domains)
    again = " ↺" if narrow else " (replay)"
    styles: Any = (("loss", "-", ""), ("replay_loss", (0, (2, 1.2)), again))
    for prefix, dashes, suffix in styles:
        for domain in run.trained_domains(prefix):
            steps, values = run.series(f"{prefix}/{domain}")
            if not len(steps):
                continue
            index = order.index(domain) if domain in order else len(order)
            shade = colour(theme, index)
            if len(steps) <= 4000:
                loss.plot(steps, values, color=shade, alpha=0.16, linewidth=0.7)
            for where in pieces(steps):  # A domain that pauses between stages isn't joined up.
                x, y = smooth(steps[where], _running_mean(values[where]))
                loss.plot(x, y, color=shade, linestyle=dashes, linewidth=1.5)
            ends.append((float(steps[-1]), float(y[-1]), domain + suffix, shade))
    if not ends:
        steps, values = run.series("loss")
        loss.plot(*smooth(steps, values), color=theme.ink, linewidth=1.5)
    loss.margins(y=0.08)
    loss_scale(loss)
    finish(loss, theme, ends, run, ylabel="training loss, nats/token", xlabel=False)
    steps, values = run.series("learning_rate")
    rate.plot(*smooth(steps, values), color=theme.ink, linewidth=1.3)
    rate.set_ylim(bottom=0)
    finish(rate, theme, [], run, ylabel="learning rate")
    rate.yaxis.set_major_locator(_ticker().MaxNLocator(3))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    rate.yaxis.get_offset_text().set(color=theme.soft, fontsize=7.5)
    return figure


def draw_comparison(runs: Sequence[Run], theme: Theme, unit: str, narrow: bool = False) -> Figure:
    """Held-out loss of each domain in a panel of its own, one line a run."""
    domains = _all_domains(runs)
    columns = 1 if narrow else min(3, len(domains))
    figure, panels = new_figure(theme, 1, columns=columns, cells=len(domains), narrow=narrow)
    for place, (axes, domain) in enumerate(zip(panels, domains, strict=False)):
        stage_bands(axes, runs[0], theme, names=False)
        for index, run in enumerate(runs):
            if domain in run.domains:
                steps, values = run.heldout(domain, unit)
                # Thinner over wider, so that runs that agree still show both.
                style = stroke(theme, index) | {"linewidth": max(1.2, 3.0 - 1.3 * index)}
                axes.plot(steps, values, **style, label=run.name)
        loss_scale(axes)
        lowest = place >= len(domains) - columns
        finish(axes, theme, [], runs[0], ylabel="", xlabel=lowest)
        axes.set_title(domain, color=theme.ink, fontsize=9, loc="left", fontweight="bold")
    for axes in panels[len(domains) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=1 if narrow else 3,
        frameon=False,
        labelcolor=theme.ink,
    )
    figure.supylabel(UNIT_LABELS[unit], color=theme.soft, fontsize=8.5)
    return figure


def save(figure: Figure, path: Any, svg: Any = None) -> None:
    """Writes a PNG (to a path or an open file) and frees the figure; same data, same bytes.

    160 colours are plenty for curves and text, and make the files a third of the size.

    Args:
        figure: closed when this returns.
        path: of the PNG, or an open file.
        svg: path or open file of the same as SVG, for papers and talks: text as text, no date.
    """
    import matplotlib
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor=figure.get_facecolor(), format="png")
    if svg is not None:
        # Ids are hashes with this salt (random otherwise).
        with matplotlib.rc_context({"svg.hashsalt": "lcl", "svg.fonttype": "none"}):
            figure.savefig(
                svg, facecolor=figure.get_facecolor(), format="svg", metadata={"Date": None}
            )
    pyplot().close(figure)
    image = Image.open(drawn).convert("RGB").quantize(160, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True)


def common_unit(runs: Sequence[Run]) -> str:
    """bits/byte where every run has it (it crosses tokenizers and languages), else nats/token."""
    return "bits_per_byte" if all(r.has_bytes for r in runs) else "nats_per_token"


UNIT_LABELS = {
    "bits_per_byte": "held-out loss, bits/byte",
    "nats_per_token": "held-out loss, nats/token",
}


def _all_domains(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(d for run in runs for d in run.domains))


def pyplot() -> Any:
    """matplotlib.pyplot, imported now, on a backend without a window."""
    import matplotlib

    # A report needs no window. A notebook, which has chosen its backend already, keeps it.
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _ticker() -> Any:
    import matplotlib.ticker

    return matplotlib.ticker


def new_figure(
    theme: Theme, panels: int, *, columns: int = 1, cells: int | None = None, narrow: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure: `panels` above one another, or a grid of `cells` in `columns`."""
    plt = pyplot()
    width, dpi = (4.3, 200) if narrow else (9.2, 150)
    ratios: dict[str, Any] = {"height_ratios": (3.1, 1)} if cells is None and panels == 2 else {}
    if cells is not None:
        rows = -(-cells // columns)
        height = 0.5 + (1.9 if narrow else 2.3) * rows
    else:
        rows, columns = panels, 1
        height = 3.7 if panels == 1 else 4.7
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        layout="constrained",
        dpi=dpi,
        squeeze=False,
        sharex=True,
        **ratios,
    )
    figure.set_facecolor(theme.paper)
    return figure, list(axes.flat)


def stroke(theme: Theme, index: int) -> dict[str, Any]:
    """Line style of the index-th domain or run: a colour, then dashes once the colours are used."""
    return {
        "color": colour(theme, index),
        "linewidth": 1.7,
        "linestyle": _DASHES[index // len(theme.series) % len(_DASHES)],
    }


def stage_bands(axes: Axes, run: Run, theme: Theme, names: bool = True, width: float = 7.4) -> None:
    """Every other stage on a tinted band, its name above it; `width` is the axes' in inches."""
    shown = max(run.steps_done, 1)
    for index, stage in enumerate(run.stages):
        if stage.first_step >= shown:
            break
        end = min(stage.end_step, shown)
        if index % 2 == 0:
            axes.axvspan(stage.first_step, end, color=theme.band, zorder=0, linewidth=0)
        if index:
            axes.axvline(stage.first_step, color=theme.line, linewidth=0.9, zorder=1)
        label = (
            _fitting_label(index, stage, (end - stage.first_step) / shown * width) if names else ""
        )
        if label:
            axes.text(
                stage.first_step + 0.008 * shown,
                1.015,
                label,
                transform=axes.get_xaxis_transform(),
                color=theme.soft,
                fontsize=7.5,
                va="bottom",
                clip_on=False,
            )


def _fitting_label(index: int, stage: StageInfo, inches: float) -> str:
    """The most that can be said of a stage in so much room."""
    replay = (stage.replay or {}).get("fraction")
    full = f"{index + 1}  {stage.name}"
    more = f"{full}  + {100 * replay:.0f}% replay" if replay else full
    # A letter of 7.5 pt is about 0.062 in wide.
    return next((x for x in (more, full, str(index + 1)) if 0.062 * len(x) + 0.1 < inches), "")


def quiet(axes: Axes, theme: Theme) -> None:
    """Two spines, a faint grid below the curves, small ticks: what every figure shares."""
    axes.set_facecolor(theme.paper)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.line)
    axes.tick_params(colors=theme.soft, labelsize=7.5, length=3)
    axes.grid(axis="y", color=theme.line, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)


def finish(
    axes: Axes,
    theme: Theme,
    ends: Sequence[tuple[float, float, str, str]],
    run: Run,
    *,
    ylabel: str,
    xlabel: bool = True,
) -> None:
    """Quiet axes, and each curve's name at its end, moved apart where they would touch."""
    quiet(axes, theme)
    axes.set_ylabel(ylabel, color=theme.soft, fontsize=8.5)
    axes.set_xlim(0, max(run.steps_done, 1))
    if xlabel:
        axes.set_xlabel("step", color=theme.soft, fontsize=8.5)
    _label_ends(axes, ends, max(run.steps_done, 1))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], last: int) -> None:
    """Names of curves (x, y, name, colour): in the margin, or where a curve stops earlier."""
    from matplotlib.patheffects import withStroke

    paper = axes.get_facecolor()
    style: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "annotation_clip": False}
    margin = []
    for x, y, text, shade in ends:
        if x > 0.94 * last:
            to_axes = axes.transData + axes.transAxes.inverted()
            margin.append((float(to_axes.transform((x, y))[1]), text, shade))
        else:
            axes.annotate(
                text, (x, y), (-3, -5), textcoords="offset points", color=shade,
                ha="right", va="top", path_effects=[withStroke(linewidth=3, foreground=paper)],
                **style,
            )  # fmt: skip
    # A label of 8 pt needs about 0.16 in.
    figure: Any = axes.figure
    gap = 0.16 / (figure.get_figheight() * axes.get_position().height)
    margin.sort(key=lambda one: one[0])
    for (_, text, shade), y in zip(
        margin, spread([m[0] for m in margin], gap, 0.0, 1.0), strict=True
    ):
        axes.annotate(
            text, (1, y), (7, 0), xycoords="axes fraction", textcoords="offset points",
            color=shade, va="center", **style,
        )  # fmt: skip


def loss_scale(axes: Axes) -> None:
    """A logarithmic axis where the values span enough, so that the low end can be told apart."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    values = np.concatenate(drawn) if drawn else np.ones(1)
    values = values[values > 0]
    if not len(values) or values.max() / values.min() < 2.5:
        return
    ticker = _ticker()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves sorted places apart to at least `gap`, as little as that takes.

    >>> spread([1.0, 1.0, 3.0], 0.5, 0.0, 4.0)
    [0.75, 1.25, 3.0]
    """
    clusters: list[tuple[float, int]] = []  # (centre, how many)
    for place in places:
        clusters.append((place, 1))
        while len(clusters) > 1:
            (a, n), (b, m) = clusters[-2:]
            if b - a >= gap * (n + m) / 2 - 1e-12:
                break
            clusters[-2:] = [((a * n + b * m) / (n + m), n + m)]
    out: list[float] = []
    for centre, count in clusters:
        half = gap * (count - 1) / 2
        centre = min(max(centre, low + half), max(high - half, low + half))
        out.extend(centre - half + gap * i for i in range(count))
    return out


def _running_mean(values: np.ndarray) -> np.ndarray:
    """A centred mean over about a fortieth of the points; ends use what there is."""
    width = max(1, len(values) // 40)
    if width == 1:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def pieces(steps: np.ndarray) -> list[slice]:
    """Stretches without a gap much longer than the usual one."""
    if len(steps) < 3:
        return [slice(0, len(steps))]
    gaps = np.diff(steps)
    cuts = [0, *(np.nonzero(gaps > 8 * max(np.median(gaps), 1))[0] + 1).tolist(), len(steps)]
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
