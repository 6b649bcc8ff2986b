"""A figure on a page and beside it.

on the page     PNG, inline: light and dark, for a desk and for a phone
beside it       NAME.png, NAME.svg and NAME_dark.png, NAME_dark.svg, which its caption links
"""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from lcl import files
from lcl.report import page, plots

# (theme, narrow) -> Figure.
DrawFn = Callable[[plots.Theme, bool], Any]


def put_figure(folder: Path, name: str, draw: DrawFn, alt: str, caption: str) -> str:
    """Draws a figure for both schemes and widths, writes the wide ones, returns it as HTML.

    Args:
        folder: where the page lies.
        name: of the files, without an ending; letters, digits and underscores.
        draw: called for each scheme and width; its figure is closed.
        alt: what the figure shows, in words. Plain text.
        caption: HTML; links to the files are added.

    Raises:
        OSError: a file that cannot be written.
    """
    pngs = {}
    for theme in plots.THEMES:
        pngs[theme.name] = _write(folder, name, theme, draw(theme, False))
        narrow = io.BytesIO()
        plots.save(draw(theme, True), narrow)
        pngs[f"{theme.name} narrow"] = narrow.getvalue()
    return page.figure(pngs, alt, f"{caption} {links(name)}")


def put_files(
    folder: Path, name: str, draw: Callable[[plots.Theme], Any], *, dark: bool = True
) -> str:
    """Writes a figure that is not on the page itself (a table says the same), returns its links."""
    for theme in plots.THEMES if dark else (plots.LIGHT,):
        _write(folder, name, theme, draw(theme))
    return links(name, dark=dark)


def links(name: str, *, dark: bool = True) -> str:
    """Links to a figure's files, for a page in the same folder.

    >>> links("lengths", dark=False)
    '<a href="lengths.png">PNG</a> <a href="lengths.svg">SVG</a>'
    """
    kinds = [("png", ""), ("svg", ""), *((("png", "_dark"), ("svg", "_dark")) if dark else ())]
    return " ".join(
        f'<a href="{escape(name)}{suffix}.{kind}">{"dark " if suffix else ""}{kind.upper()}</a>'
        for kind, suffix in kinds
    )


def _write(folder: Path, name: str, theme: plots.Theme, figure: Any) -> bytes:
    """NAME.png and NAME.svg of one scheme; the PNG's bytes."""
    stem = name if theme is plots.LIGHT else f"{name}_{theme.name}"
    png, svg = io.BytesIO(), io.BytesIO()
    plots.save(figure, png, svg=svg)
    files.write_whole(folder / f"{stem}.png", png.getvalue())
    files.write_whole(folder / f"{stem}.svg", svg.getvalue())
    return png.getvalue()
