"""The page around a report: its style sheet, and small functions from values to HTML.

One file that can be sent around: no script, no network, images inline. Light and dark follow the
reader's system; wide tables scroll by themselves on a phone.
"""

from __future__ import annotations

import base64
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lcl.evals.loss_matrix import LossMatrix, format_loss

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d8dde3; --band: #f4f6f8;
  --bar: 8rem; --accent: #0072b2; --rgb: 0, 114, 178; --worse: #a63d00; --better: #00704f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15191e; --ink: #e8ebee; --soft: #9aa4af; --line: #333b44; --band: #1b2027;
    --accent: #5cb3e8; --rgb: 92, 179, 232; --worse: #ff9e4a; --better: #3ecf9c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 70rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .35rem; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h1, h2, h3 { overflow-wrap: anywhere; text-wrap: balance; }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.soft, figcaption, .caption { color: var(--soft); font-size: .9rem; }
.run { border-top: 1px solid var(--line); margin-top: 4rem; padding-top: .1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .75rem; margin: 1.4rem 0 0; padding: 0; }
.tiles div { background: var(--band); border-radius: .6rem; padding: .75rem .95rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd small { font-size: .8rem; font-weight: 400; color: var(--soft); display: block; }
.scroll { overflow-x: auto; padding-bottom: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .38rem .8rem; text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line);
  vertical-align: bottom; white-space: normal; }
tbody th { text-align: left; font-weight: 500; }
thead th:first-child { text-align: left; }
th:first-child { padding-left: 0; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr.mean > * { border-top: 2px solid var(--line); font-weight: 600; }
th small, td small { display: block; font-weight: 400; color: var(--soft); }
td.name, thead th.name { text-align: left; } td.name { white-space: normal; }
tbody th[rowspan] { vertical-align: top; }
.groups { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; align-items: flex-start; }
.table { max-width: 100%; min-width: min(100%, 21rem); margin: .7rem 0 1rem; }
/* A caption is as wide as its table, and never makes it wider. */
.caption { width: 0; min-width: 100%; margin: 0 0 .3rem; }
table.heat { border-collapse: separate; border-spacing: 3px; }
table.heat td { text-align: center; border: 0; border-radius: .35rem; min-width: 4.3rem;
  padding-left: .4rem; padding-right: .4rem; }
table.heat th { border: 0; } table.heat thead th { text-align: center; }
table.heat td.home { box-shadow: inset 0 0 0 2px var(--ink); font-weight: 600; }
table.heat td.also { box-shadow: inset 0 0 0 1.5px var(--soft); }
.worse { color: var(--worse); } .better { color: var(--better); }
figure { margin: .8rem 0 1.6rem; } figure img { width: 100%; height: auto; display: block; }
.bar { display: inline-block; height: .55rem; border-radius: .2rem; background: var(--accent); }
.bar.replayed { opacity: .45; }
.legend { display: inline-block; width: .8rem; margin-right: .35rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem;
  margin: .6rem 0; font-size: .95rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .6rem; margin: .6rem 0;
  padding: .5rem .9rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  margin: .6rem 0 .2rem; }
pre.sample { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; }
pre.sample mark { background: rgba(var(--rgb), .18); color: inherit; border-radius: .2rem; }
a { color: var(--accent); }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: .8rem; }
@media (max-width: 34rem) {
  :root { --bar: 3.2rem; } body { padding-top: 1.5rem; font-size: 15px; }
  table { font-size: .85rem; } tbody th { white-space: normal; min-width: 4.5rem; }
  th, td { padding: .34rem .38rem; } table.heat { border-spacing: 2px; }
  table.heat td { min-width: 3rem; padding: .4rem .15rem; } table.heat th { padding: .2rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .5rem; }
}
@media print { body { max-width: none; } details { break-inside: avoid; } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def figure(pngs: Mapping[str, bytes], alt: str, caption: str) -> str:
    """An image, inline, in the form that suits the reader's scheme and screen.

    `pngs` has "light", "dark", "light narrow" and "dark narrow".
    """
    dark, phone = "(prefers-color-scheme: dark)", "(max-width: 34rem)"
    sources = "".join(
        f'<source media="{media}" srcset="{_data(pngs[kind])}">'
        for kind, media in (
            ("dark narrow", f"{phone} and {dark}"),
            ("light narrow", phone),
            ("dark", dark),
        )
    )
    return (
        f'<figure><picture>{sources}<img alt="{escape(alt)}" src="{_data(pngs["light"])}">'
        f"</picture><figcaption>{caption}</figcaption></figure>"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: (label, number, small print)."""
    cells = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>"
        for a, b, c in items
    )
    return f'<dl class="tiles">{cells}</dl>'


def facts(items: Mapping[str, Any]) -> str:
    """A list of names and values; empty ones are left out."""
    rows = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>"
        for k, v in items.items()
        if v not in (None, "", {}, [])
    )
    return f'<dl class="facts">{rows}</dl>'


def folded(summary: str, text: str) -> str:
    """A long text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def table(
    caption: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], mean: bool = False
) -> str:
    """A plain table; names are escaped, heads and cells are HTML. `mean` sets the last row apart.

    Rows of one name that follow one another share it.
    """
    heads = "".join(h if h.startswith("<th") else f'<th scope="col">{h}</th>' for h in head)
    body: list[str] = []
    for name, alike in itertools.groupby(rows, operator.itemgetter(0)):
        group = list(alike)
        spans = f'scope="rowgroup" rowspan="{len(group)}"' if len(group) > 1 else 'scope="row"'
        th = f"<th {spans}>{breakable(name)}</th>"
        for _, cells in group:
            kind = ' class="mean"' if mean and len(body) == len(rows) - 1 else ""
            tds = "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells)
            body.append(f"<tr{kind}>{th}{tds}</tr>")
            th = ""  # those below share it
    return (
        f'<div class="table"><p class="caption">{caption}</p><div class="scroll"><table><thead>'
        f"<tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div></div>"
    )


NAME_HEAD = '<th scope="col" class="name">domain</th>'  # the head over `name_cell`s of domains


def name_cell(name: str) -> str:
    """A cell of a table that holds a name rather than a number.

    >>> name_cell("en")
    '<td class="name">en</td>'
    """
    return f'<td class="name">{breakable(name)}</td>'


def capital(text: str) -> str:
    """The text with its first letter as a sentence has it.

    >>> capital("one line"), capital("")
    ('One line', '')
    """
    return text[:1].upper() + text[1:]


def breakable(name: str) -> str:
    """A name that may be broken after - _ and /, so that narrow columns stay narrow.

    >>> breakable("replay_25")
    'replay_<wbr>25'
    """
    name = escape(name)
    for mark in "-_/":
        name = name.replace(mark, f"{mark}<wbr>")
    return name


def signed(value: float | None, *, tint: bool = True) -> str:
    """A signed loss difference: worse (up) and better (down) are tinted and keep their sign."""
    text = format_loss(value, signed=True)
    if not tint or value is None or text in ("0.000", "–"):
        return text
    return f'<span class="{"worse" if value > 0 else "better"}">{text}</span>'


def heat_table(matrix: LossMatrix, shares: np.ndarray, caption: str) -> str:
    """The loss matrix: a darker cell is a lower loss within its column; own stage boxed."""
    heads = ["<th></th>"]
    for domain in matrix.domains:
        small = "<small>not trained</small>" if domain in matrix.never_trained else ""
        heads.append(f'<th scope="col">{breakable(domain)}{small}</th>')
    rows = []
    for i, label in enumerate(["start", *(f"after {s}" for s in matrix.stages)]):
        cells = []
        for j, domain in enumerate(matrix.domains):
            kind = ""
            if matrix.home_stage[domain] == i:
                kind = ' class="home" title="the stage that trained it most"'
            elif i and matrix.trained[i - 1, j] > 0:
                kind = ' class="also" title="this stage trained it too"'
            share = 0.0 if np.isnan(shares[i, j]) else float(shares[i, j])
            tint = f'style="background: rgba(var(--rgb), {0.06 + 0.5 * share:.2f})"'
            cells.append(f"<td{kind} {tint}>{format_loss(float(matrix.values[i, j]))}</td>")
        rows.append(f'<tr><th scope="row">{breakable(label)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="table"><p class="caption">{caption}</p><div class="scroll">'
        f'<table class="heat"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def bar(share: float, kind: str = "") -> str:
    """A bar of a table's row, `share` of 8 rem wide (3.2 on a phone)."""
    return f'<span class="bar {kind}" style="width:calc({share:.4f} * var(--bar))"></span>'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
