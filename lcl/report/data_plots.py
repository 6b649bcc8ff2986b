"""The figures of the report on data; colours and saving are those of `lcl.report.plots`.

Each `draw_*` takes the report and a theme and returns a Figure; `narrow` is for a phone. A domain
has one colour in all figures, and replayed tokens are the pale one of their domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.report import plots
from lcl.report.data_read import DataReport
from lcl.report.data_text import windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALE = 0.45


def colour_of(report: DataReport, theme: plots.Theme, domain: str) -> str:
    """A domain's colour: its place among the domains of the stream, or of the root."""
    names = report.stream.domains if report.stream else [line.domain for line in report.domains]
    return plots.colour(theme, list(names).index(domain))


def draw_lengths(report: DataReport, theme: plots.Theme, narrow: bool = False) -> Figure:
    """Share of documents (outlined) and of tokens (filled) by length, a panel a domain."""
    lines = report.domains
    columns = 1 if narrow else _columns(len(lines))
    figure, panels = _grid(theme, len(lines), columns, narrow)
    low = min(int(line.lengths.edges[0]).bit_length() for line in lines) - 1
    high = max(int(line.lengths.edges[-1]).bit_length() for line in lines) - 1
    top = 0.0
    for axes, line in zip(panels, lines, strict=True):
        lengths, shade = line.lengths, colour_of(report, theme, line.domain)
        places = np.log2(lengths.edges[:-1]) + 0.5
        tokens = lengths.tokens / max(1, lengths.num_tokens)
        documents = lengths.documents / max(1, lengths.num_documents)
        top = max(top, tokens.max(), documents.max())
        axes.bar(places, tokens, width=0.86, color=shade, alpha=0.85, label="tokens")
        axes.bar(
            places, documents, width=0.86, fill=False, edgecolor=theme.ink, linewidth=1.1,
            label="documents",
        )  # fmt: skip
        plots.quiet(axes, theme)
        _title(axes, theme, line.domain)
    for axes in panels:
        axes.set_xlim(low, high)
        axes.set_ylim(0, 1.08 * top)
        _length_ticks(axes, low, high)
        axes.yaxis.set_major_formatter(_formatter(lambda v: f"{100 * v:.0f}%"))
    for axes in panels[-columns:]:
        axes.set_xlabel("document length, tokens", color=theme.soft, fontsize=8.5)
    handles, labels = panels[0].get_legend_handles_labels()
    _legend(figure, theme, handles, [f"share of {label}" for label in labels], 2)
    return figure


def draw_flow(report: DataReport, theme: plots.Theme, narrow: bool = False) -> Figure:
    """Tokens a step by source over the steps, stacked; replayed ones pale; stages above."""
    assert report.flow is not None and report.stream is not None
    flow, stream = report.flow, report.stream
    figure, (axes,) = _grid(theme, 1, 1, narrow, height=3.4)
    steps = np.diff(flow.edges)[:, None]
    below = np.zeros(len(steps))
    total = (flow.new.sum(axis=1) + flow.replayed.sum(axis=1)) / steps[:, 0]
    for kind, values, alpha in (("", flow.new, 0.9), (", replayed", flow.replayed, _PALE)):
        for d, domain in enumerate(stream.domains):
            height = values[:, d] / steps[:, 0]
            if not height.any():
                continue
            axes.stairs(
                below + height, flow.edges, baseline=below, fill=True, linewidth=0,
                color=plots.colour(theme, d), alpha=alpha, label=domain + kind,
            )  # fmt: skip
            below = below + height
    plots.quiet(axes, theme)
    axes.set_xlim(0, stream.num_steps)
    axes.set_ylim(0, 1.06 * total.max())
    axes.yaxis.set_major_formatter(_formatter(lambda v: f"{v:,.0f}"))
    axes.set_xlabel("step", color=theme.soft, fontsize=8.5)
    axes.set_ylabel("tokens a step", color=theme.soft, fontsize=8.5)
    _stage_names(axes, theme, stream, 2.9 if narrow else 7.9)
    _legend(figure, theme, *axes.get_legend_handles_labels(), 2 if narrow else 5)
    return figure


def draw_paths(report: DataReport, theme: plots.Theme, narrow: bool = False) -> Figure:
    """Cosine of neighbours along each path, in windows, against a shuffled order."""
    columns = 1 if narrow else min(2, len(report.paths))
    figure, panels = _grid(theme, len(report.paths), columns, narrow)
    for axes, path in zip(panels, report.paths, strict=True):
        shade = colour_of(report, theme, path.domain)
        curves: tuple[tuple[np.ndarray, dict[str, Any]], ...] = (
            (path.shuffled, {"color": theme.soft, "linewidth": 1.2, "label": "shuffled"}),
            (path.similarity, {"color": shade, "linewidth": 1.6, "label": path.order}),
        )
        for values, style in curves:
            means = windows(values, 120)
            places = (np.arange(len(means)) + 0.5) * len(values) / max(1, len(means))
            axes.plot(places, means, **style)
            axes.axhline(
                float(values.mean()) if len(values) else 0.0, color=style["color"],
                linewidth=0.8, linestyle=(0, (4, 3)),
            )  # fmt: skip
        plots.quiet(axes, theme)
        axes.set_ylim(min(0.0, float(path.shuffled.min(initial=0.0)) * 0.5), 1.02)
        axes.set_xlim(0, max(1, len(path.similarity)))
        _title(axes, theme, f"{path.stage}: {path.domain}")
    for axes in panels[-columns:]:
        axes.set_xlabel("place along the order", color=theme.soft, fontsize=8.5)
    figure.supylabel("cosine of neighbours", color=theme.soft, fontsize=8.5)
    _legend(figure, theme, *panels[0].get_legend_handles_labels(), 2)
    return figure


def _grid(
    theme: plots.Theme, cells: int, columns: int, narrow: bool, height: float | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of `cells` panels in `columns`; those left over are taken away."""
    plt = plots.pyplot()
    rows = -(-cells // columns)
    width, dpi = (4.3, 200) if narrow else (9.2, 150)
    tall = height if height is not None else 0.75 + (1.7 if narrow else 2.0) * rows
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, tall), layout="constrained", dpi=dpi, squeeze=False
    )
    figure.set_facecolor(theme.paper)
    flat = list(axes.flat)
    for extra in flat[cells:]:
        extra.remove()
    return figure, flat[:cells]


def _columns(cells: int) -> int:
    return 2 if cells in (2, 4) else min(3, cells)


def _title(axes: Axes, theme: plots.Theme, text: str) -> None:
    axes.set_title(text, color=theme.ink, fontsize=9, loc="left", fontweight="bold")


def _legend(
    figure: Figure, theme: plots.Theme, handles: Sequence[Any], labels: Sequence[str], columns: int
) -> None:
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False,
        labelcolor=theme.ink, fontsize=8, handlelength=1.4, columnspacing=1.6,
    )  # fmt: skip


def _stage_names(axes: Axes, theme: plots.Theme, stream: Any, inches: float) -> None:
    """A rule at each border, and the stages' names above, where there is room for them."""
    starts = [*stream.stage_starts, stream.num_steps]
    for i, name in enumerate(stream.stage_names):
        if i:
            axes.axvline(starts[i], color=theme.paper, linewidth=1.6)
        room = (starts[i + 1] - starts[i]) / stream.num_steps * inches
        said = next((s for s in (f"{i + 1}  {name}", str(i + 1)) if 0.062 * len(s) < room), "")
        axes.text(
            starts[i] + 0.005 * stream.num_steps, 1.01, said, va="bottom", color=theme.soft,
            fontsize=7.5, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _length_ticks(axes: Axes, low: int, high: int) -> None:
    """Powers of two, as many as can be read: 256, 1k, 4k, ..."""
    step = max(1, -(-(high - low) // 6))
    places = np.arange(low, high + 1, step)
    axes.set_xticks(places, [_power(int(p)) for p in places])


def _power(log2: int) -> str:
    for floor, unit in ((30, "G"), (20, "M"), (10, "k")):
        if log2 >= floor:
            return f"{2 ** (log2 - floor)}{unit}"
    return str(2**log2)


def _formatter(text_fn: Any) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: text_fn(value))
