"""The report on data as one HTML page with its pictures: `build_data_report(read_root(data), out)`.

OUT/index.html          everything, images inline: one file to send around
OUT/lengths.png, .svg   also lengths_dark.png, .svg; tokens and similarity where they apply
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lcl import files
from lcl.data.inspect import SampleRow
from lcl.report import data_plots, data_text, page
from lcl.report.data_read import DataReport, PlanLine
from lcl.report.figures import put_figure
from lcl.report.progress import human

_STYLE = """
.row { margin: 1.1rem 0 1.6rem; }
.row > p { margin: 0 0 .35rem; font-size: .9rem; max-width: none; }
.strip { display: flex; height: .8rem; border-radius: .25rem; overflow: hidden; margin: 0 0 .4rem;
  background: repeating-linear-gradient(45deg, var(--band) 0 4px, var(--line) 4px 5px); }
.strip span { background: rgba(var(--rgb), .75); border-right: 2px solid var(--paper); }
.strip span:nth-child(even) { background: rgba(var(--rgb), .38); }
.strip span.added { background: var(--worse); }
.text { font: .8rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; max-height: 15rem;
  overflow: auto; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text .name { display: block; color: var(--soft); border-top: 1px dashed var(--soft);
  margin-top: .5rem; padding-top: .3rem; }
.text .name:first-child { border: 0; margin: 0; padding: 0; }
"""


def build_data_report(report: DataReport, out: str | os.PathLike[str]) -> Path:
    """Writes the page and its pictures, each file atomically.

    Args:
        report: from `lcl.report.data_read`.
        out: the directory; made if need be.

    Returns:
        The path of index.html.

    Raises:
        ValueError: a place one cannot write to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        html = page.document(f"{report.title} · lcl data", _body(report, folder))
        html = html.replace("</style>", f"{_STYLE}</style>", 1)
        files.write_whole(folder / "index.html", html.encode())
    except OSError as error:
        raise ValueError(
            f"cannot write the report to {error.filename or folder}: "
            f"{error.strerror or error}; give another --out"
        ) from error
    return folder / "index.html"


def _body(report: DataReport, folder: Path) -> list[str]:
    stream = report.stream
    said = [
        report.root,
        f"tokenizer {report.tokenizer}",
        f"{stream.num_steps:,} steps in {len(stream.stage_names)} stages" if stream else "",
        f"stream {stream.fingerprint[:12]}" if stream else "",
    ]
    parts = [
        f"<header><h1>{escape(report.title)}</h1>",
        f'<p class="soft">{escape(" · ".join(s for s in said if s))}</p></header>',
        "<main>",
        _tiles(report),
        *_lengths(report, folder),
        *_plans(report),
        *_flow(report, folder),
        *_paths(report, folder),
        *_samples(report),
        "</main>",
        '<footer class="soft">Written by <code>lcl data report</code>. Lengths are in tokens to '
        "predict: a stored document has one more, its beginning.</footer>",
    ]
    return parts


def _tiles(report: DataReport) -> str:
    documents = sum(line.lengths.num_documents for line in report.domains)
    tokens = sum(line.lengths.num_tokens for line in report.domains)
    items = [
        ("documents", f"{documents:,}", f"in {len(report.domains)} domains, training split"),
        ("tokens", human(tokens), f"{tokens:,}"),
    ]
    if report.stream and report.flow:
        new, again = int(report.flow.new.sum()), int(report.flow.replayed.sum())
        share = f"{again / max(1, new + again):.1%} of them replayed"
        items.append(("trained tokens", human(new + again), share))
        cells = sum((p.num_rows or 0) * p.line.cells / max(1, p.line.rows) for p in report.plans)
        padded = sum((p.num_rows or 0) * p.line.padding / max(1, p.line.rows) for p in report.plans)
        items.append(("padding", f"{padded / max(1, cells):.2%}", "of the new rows' cells"))
    return page.tiles(items)


def _lengths(report: DataReport, folder: Path) -> list[str]:
    rows = []
    for line in report.domains:
        lengths = line.lengths
        cells = [f"{lengths.num_documents:,}", f"{lengths.num_tokens:,}", f"{line.share:.1%}"]
        cells += [f"{int(q):,}" for q in lengths.quantiles]
        rows.append((line.domain, cells))
    head = ["", "documents", "tokens", "share", "shortest", "10%", "median", "90%", "longest"]
    ledgers = {line.domain: data_text.ledger_line(line.ledger) for line in report.domains}
    return [
        "<h2>Lengths of the documents</h2>",
        page.table("Training split; lengths in tokens to predict.", head, rows),
        put_figure(
            folder,
            "lengths",
            lambda theme, narrow: data_plots.draw_lengths(report, theme, narrow),
            "Histograms of document lengths: "
            + "; ".join(
                f"{x.domain} median {int(x.lengths.quantiles[2]):,}" for x in report.domains
            ),
            "Filled: where the tokens are. Outlined: where the documents are. Bins double.",
        ),
        *(["<h3>Ledgers, both splits</h3>", page.facts(ledgers)] if any(ledgers.values()) else []),
    ]


def _plans(report: DataReport) -> list[str]:
    if not report.plans:
        return []
    head = ["", "layout", "rows", "fill", "padding", "cut documents", "needlessly"]
    head += ["tokens after a cut", "dropped", "mean context"]
    staged = any(plan.stage for plan in report.plans)
    if staged:
        head.append("epochs")
    rows = [
        (_name(plan), [escape(plan.layout), *data_text.plan_cells(plan)]) for plan in report.plans
    ]
    title = "Rows: fill, padding, truncation"
    parts = [f"<h2>{title}</h2>", page.table(page.capital(escape(data_text.TERMS)), head, rows)]
    decomposed = [plan for plan in report.plans if len(plan.buckets) > 1]
    if decomposed:
        parts += ["<h2>Buckets of the decomposition</h2>", '<div class="groups">']
        parts += [*map(_buckets, decomposed), "</div>"]
    return parts


def _buckets(plan: PlanLine) -> str:
    total = max(1, sum(bucket.tokens for bucket in plan.buckets))
    most = max(bucket.tokens for bucket in plan.buckets) or 1
    rows = [
        (
            f"{bucket.row_length:,}",
            [
                f"{bucket.rows:,}",
                f"{bucket.tokens:,}",
                f"{bucket.padding:,}",
                f"{bucket.tokens / total:.1%}",
                f'<td style="text-align:left" aria-hidden="true">'
                f"{page.bar(bucket.tokens / most)}</td>",
            ],
        )
        for bucket in plan.buckets
    ]
    head = ["row length", "rows", "tokens", "padding", "share", ""]
    return page.table(f"<strong>{escape(_name(plan))}</strong>", head, rows)


def _flow(report: DataReport, folder: Path) -> list[str]:
    if report.flow is None or report.stream is None:
        return []
    new, again = report.flow.new.sum(axis=0), report.flow.replayed.sum(axis=0)
    ledger = report.stream.ledger(report.stream.num_steps)
    most = max(1, int((new + again).max()))
    rows = []
    for d, domain in enumerate(report.stream.domains):
        bars = page.bar(new[d] / most) + page.bar(again[d] / most, "replayed")
        epochs = f"{ledger[domain]['epochs']:.2f}"
        cell = f'<td style="text-align:left" aria-hidden="true">{bars}</td>'
        rows.append((domain, [f"{new[d]:,}", f"{again[d]:,}", epochs, cell]))
    rows.append(("total", [f"{new.sum():,}", f"{again.sum():,}", "", ""]))
    alt = "; ".join(f"{name} {cells[0]} new, {cells[1]} replayed" for name, cells in rows)
    return [
        "<h2>Tokens by source and step</h2>",
        put_figure(
            folder,
            "tokens",
            lambda theme, narrow: data_plots.draw_flow(report, theme, narrow),
            f"Tokens a step by domain over {report.stream.num_steps:,} steps: {alt}.",
            "Exact counts of tokens trained on, padding left out; replayed tokens pale.",
        ),
        page.table(
            "New (strong) and replayed (pale) tokens of all stages, and passes over the text.",
            ["", "new tokens", "replayed", "epochs", ""],
            rows,
            mean=True,
        ),
    ]


def _paths(report: DataReport, folder: Path) -> list[str]:
    if not report.paths:
        return []
    rows = [
        (
            f"{path.stage} / {path.domain}",
            [
                escape(path.order),
                f"{len(path.similarity) + 1:,}",
                f"{float(path.similarity.mean()):.3f}",
                f"{float(path.shuffled.mean()):.3f}",
                f"{path.jumps:,}",
                f"{path.near_duplicates:,}",
            ],
        )
        for path in report.paths
    ]
    alt = "; ".join(f"{name} {cells[2]}, shuffled {cells[3]}" for name, cells in rows)
    return [
        "<h2>Similarity along the order</h2>",
        put_figure(
            folder,
            "similarity",
            lambda theme, narrow: data_plots.draw_paths(report, theme, narrow),
            f"Mean cosine of neighbouring documents: {alt}.",
            "Cosine of each document to the one before it, in windows; dashed: the mean.",
        ),
        page.table(
            "Mean cosine of neighbouring documents.",
            ["", "order", "documents", "along it", "shuffled", "jumps", "near-duplicates"],
            rows,
        ),
    ]


def _samples(report: DataReport) -> list[str]:
    if not report.samples:
        return []
    return [
        "<h2>Sample rows</h2>",
        '<p class="soft">The strip is the row: a block a document, hatched where it is padding. '
        "⏎ is a line break.</p>",
        *map(_sample, report.samples),
    ]


def _sample(row: SampleRow) -> str:
    blocks, texts = [], []
    for piece in row.pieces:
        name = escape(data_text.piece_heading(piece))
        kind = ' class="added"' if piece.document_id is None else ""
        share = 100 * piece.length / row.row_length
        blocks.append(f'<span{kind} style="width:{share:.3f}%" title="{name}"></span>')
        text = escape(data_text.printable(piece.text)).replace("⏎", "\n")
        texts.append(f'<span class="name">{name}</span>{text}')
    return (
        f'<div class="row"><p>{escape(data_text.row_heading(row))}; {_count(row.pieces)}, '
        f'{row.padding:,} padding</p><div class="strip">{"".join(blocks)}</div>'
        f'<div class="text" tabindex="0">{"".join(texts)}</div></div>'
    )


def _count(pieces: Sequence[Any]) -> str:
    return f"{len(pieces)} piece{'' if len(pieces) == 1 else 's'}"


def _name(plan: PlanLine) -> str:
    return f"{plan.stage} / {plan.domain}" if plan.stage else plan.domain
