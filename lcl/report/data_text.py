"""The report on data for a terminal: plain tables, histograms of one character a bin."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.inspect import SampleRow
from lcl.report.data_read import DataReport, DomainLine, PlanLine

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 100
_SAMPLE_LINES = 2

TERMS = (
    "fill: share of the rows' cells that hold a token; cut: documents in more than one row; "
    "needless: cut though shorter than a row; after a cut: tokens that cannot see their document's "
    "start; dropped: in no row; context: tokens one can see within its document, on average."
)


def data_text(report: DataReport, *, samples: bool = True) -> str:
    """The whole report as text, without a newline at the end."""
    parts = [f"{report.title}: {report.root}, tokenizer {report.tokenizer}"]
    parts += [ledger_text(report.domains), layouts_text(report)]
    parts += [flow_text(report), paths_text(report)]
    if samples and report.samples:
        parts.append("\n\n".join(["sample rows", *map(sample_text, report.samples)]))
    return "\n\n".join(part for part in parts if part)


def layouts_text(report: DataReport) -> str:
    """Lengths, rows and buckets."""
    parts = [lengths_text(report), plans_text(report.plans), buckets_text(report.plans)]
    return "\n\n".join(part for part in parts if part)


def lengths_text(report: DataReport) -> str:
    """Lengths of the documents of each domain; all histograms share their bins."""
    low = min(int(line.lengths.edges[0]) for line in report.domains)
    high = max(int(line.lengths.edges[-1]) for line in report.domains)
    head = ["domain", "documents", "tokens", "share", "shortest", "10%", "median", "90%"]
    head += ["longest", f"documents by length, {low:,} to {high:,}"]
    rows = []
    for line in report.domains:
        lengths = line.lengths
        before = int(lengths.edges[0]).bit_length() - low.bit_length()
        after = high.bit_length() - int(lengths.edges[-1]).bit_length()
        drawn = " " * before + spark(lengths.documents) + " " * after
        quantiles = [f"{int(q):,}" for q in lengths.quantiles]
        counts = [f"{lengths.num_documents:,}", f"{lengths.num_tokens:,}", f"{line.share:.1%}"]
        rows.append([line.domain, *counts, *quantiles, f"|{drawn}|"])
    return "lengths of the training documents, in tokens to predict\n" + grid(head, rows)


def ledger_text(domains: Sequence[DomainLine]) -> str:
    """What each domain's ledger says: read = stored + dropped, reason by reason."""
    lines = []
    for line in domains:
        said = ledger_line(line.ledger)
        if said:
            lines += textwrap.wrap(
                f"{line.domain}: {said}", _WIDTH, initial_indent="  ", subsequent_indent="    "
            )
    return "\n".join(["ledgers, both splits", *lines]) if lines else ""


def ledger_line(ledger: Mapping[str, Any]) -> str:
    """A ledger in one line; "" for none.

    >>> ledger_line({"read": 3, "stored": {"train": 2}, "dropped": {"empty": 1}})
    'read 3 documents = 2 train + 1 dropped (1 empty)'
    """
    if not ledger:
        return ""
    stored = " + ".join(f"{n:,} {split}" for split, n in ledger["stored"].items())
    dropped = ", ".join(f"{n:,} {why}" for why, n in ledger["dropped"].items())
    count = sum(ledger["dropped"].values())
    text = f"read {ledger['read']:,} documents = {stored} + {count:,} dropped"
    notes = ", ".join(f"{n:,} {what}" for what, n in (ledger.get("notes") or {}).items())
    return text + (f" ({dropped})" if dropped else "") + (f"; {notes}" if notes else "")


def plans_text(plans: Sequence[PlanLine]) -> str:
    """Fill, padding and truncation of each layout."""
    if not plans:
        return ""
    staged = any(plan.stage for plan in plans)
    head = [*(["stage"] if staged else []), "domain", "layout", "rows", "fill", "padding", "cut"]
    head += ["needless", "after a cut", "dropped", "context", *(["epochs"] if staged else [])]
    rows = []
    for plan in plans:
        cells = plan_cells(plan)
        rows.append([*([plan.stage] if staged else []), plan.domain, plan.layout, *cells])
    said = textwrap.fill(TERMS, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    title = "rows" if staged else "rows, as each layout would make them"
    return f"{title}\n{grid(head, rows, left=3 if staged else 2)}\n{said}"


def plan_cells(plan: PlanLine) -> list[str]:
    """The numbers of a plan, as text; the same in terminal and page."""
    line = plan.line
    cells = [
        f"{line.rows:,}",
        f"{line.fill:.4f}",
        f"{line.padding:,}",
        f"{line.cut_documents:,}",
        f"{line.needless_cuts:,}",
        f"{line.cut_tokens / max(1, line.tokens):.1%}",
        f"{line.dropped_tokens:,}",
        f"{line.mean_context:,.0f}",
    ]
    return cells if plan.epochs is None else [*cells, f"{plan.epochs:.2f}"]


def buckets_text(plans: Sequence[PlanLine]) -> str:
    """The bucket tables of the decompositions: a line a domain, a column a row length."""
    decomposed = [plan for plan in plans if len(plan.buckets) > 1]
    staged = any(plan.stage for plan in decomposed)
    kinds: dict[tuple[int, ...], list[list[str]]] = {}
    for plan in decomposed:
        total = max(1, sum(bucket.tokens for bucket in plan.buckets))
        cells = [f"{b.rows:,} ({b.tokens / total:.0%})" for b in plan.buckets]
        names = [*([plan.stage] if staged else []), plan.domain]
        sizes = tuple(bucket.row_length for bucket in plan.buckets)
        kinds.setdefault(sizes, []).append([*names, *cells])
    names = [*(["stage"] if staged else []), "domain"]
    tables = [
        grid([*names, *(f"{size:,}" for size in sizes)], rows, left=len(names))
        for sizes, rows in kinds.items()
    ]
    title = "buckets of the decomposition: rows (and share of the tokens) by row length"
    return "\n".join([title, *tables]) if tables else ""


def flow_text(report: DataReport) -> str:
    """Tokens by stage and source, and over the steps."""
    if report.flow is None or report.stream is None:
        return ""
    flow, stream = report.flow, report.stream
    starts = [*stream.stage_starts, stream.num_steps]
    rows = []
    for s, name in enumerate(stream.stage_names):
        inside = (flow.edges[:-1] >= starts[s]) & (flow.edges[:-1] < starts[s + 1])
        new, again = flow.new[inside].sum(axis=0), flow.replayed[inside].sum(axis=0)
        total = max(1, int(new.sum() + again.sum()))
        for d, domain in enumerate(stream.domains):
            if new[d] + again[d]:
                share = f"{(new[d] + again[d]) / total:.1%}"
                rows.append([name, domain, f"{new[d]:,}", f"{again[d]:,}", share])
    text = "tokens by source\n" + grid(
        ["stage", "domain", "new", "replayed", "share"], rows, left=2
    )
    per_step = (flow.new + flow.replayed) / np.diff(flow.edges)[:, None]
    most = per_step.max() if per_step.size else 1
    width = max(map(len, stream.domains))
    lines = [
        f"  {domain.ljust(width)} |{spark(_resample(per_step[:, d], flow.edges), most)}|"
        for d, domain in enumerate(stream.domains)
        if per_step[:, d].any()
    ]
    return "\n".join([text, "", f"tokens a step, over {stream.num_steps:,} steps", *lines])


def paths_text(report: DataReport) -> str:
    """How similar neighbours are along an order by content."""
    rows = []
    for path in report.paths:
        drawn = spark(np.maximum(windows(path.similarity, 40), 0), 1.0)
        means = [f"{float(s.mean()):.3f}" for s in (path.similarity, path.shuffled)]
        counts = [f"{path.jumps:,}", f"{path.near_duplicates:,}"]
        rows.append([path.stage, path.domain, path.order, *means, *counts, f"|{drawn}|"])
    head = ["stage", "domain", "order", "mean cosine", "shuffled", "jumps", "near-duplicates"]
    head.append("along the path, 0 to 1")
    return "similarity of neighbouring documents\n" + grid(head, rows, left=3) if rows else ""


def sample_text(row: SampleRow) -> str:
    """One decoded row; a rule and a heading at each border."""
    lines = [f"  {row_heading(row)}"]
    for piece in row.pieces:
        lines.append(f"  ├─ {piece_heading(piece)} " + "─" * 8)
        lines += [f"  │ {line}" for line in _shortened(piece.text)]
    lines.append(f"  └─ {row.padding:,} cells of padding" if row.padding else "  └─")
    return "\n".join(lines)


def row_heading(row: SampleRow) -> str:
    """Where a row comes from, in words."""
    kind = "replayed, pass" if row.replay else "epoch"
    return (
        f"stage {row.stage}, step {row.step:,}, row {row.place}: {row.domain}, "
        f"{kind} {row.epoch}, {row.row_length:,} cells"
    )


def piece_heading(piece: Any) -> str:
    """Which part of which document.

    >>> from lcl.data.inspect import Piece
    >>> piece_heading(Piece(7, 256, 100, 356, "..."))
    'document 7, tokens 256-355 of 356'
    """
    if piece.document_id is None:
        return f"added by the stage: {piece.length:,} tokens"
    if piece.length == piece.whole:
        return f"document {piece.document_id}, all {piece.whole:,} tokens"
    last = piece.start + piece.length - 1
    return f"document {piece.document_id}, tokens {piece.start:,}-{last:,} of {piece.whole:,}"


def spark(values: Any, most: float | None = None) -> str:
    """A bar of one character a value; anything above 0 can be seen.

    >>> spark([0, 1, 4, 8])
    ' ▁▄█'
    """
    values = np.asarray(values, float)
    most = float(values.max()) if most is None and values.size else most
    if not most:
        return " " * len(values)
    levels = np.ceil(np.clip(values / most, 0, 1) * 8 - 1e-9).astype(int)
    return "".join(_BLOCKS[level] for level in levels)


def windows(values: np.ndarray, count: int) -> np.ndarray:
    """Means of at most `count` equal stretches of `values`.

    >>> windows(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist()
    [2.0, 6.0]
    """
    if len(values) <= count:
        return np.asarray(values, float)
    edges = np.linspace(0, len(values), count + 1).astype(int)
    return np.add.reduceat(np.asarray(values, float), edges[:-1]) / np.diff(edges)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table: the first `left` columns and histograms to the left, numbers to the right.

    >>> print(grid(["a", "b"], [["x", "1"], ["yy", "22"]]))
      a    b
      x    1
      yy  22
    """
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    drawn = [i < left or any(row[i].startswith("|") for row in rows) for i in range(len(head))]
    lines = []
    for row in table:
        cells = zip(row, widths, drawn, strict=True)
        text = "  ".join(c.ljust(w) if d else c.rjust(w) for c, w, d in cells)
        lines.append(f"  {text}".rstrip())
    return "\n".join(lines)


def _resample(values: np.ndarray, edges: np.ndarray, count: int = 60) -> np.ndarray:
    """`values` of the stretches between `edges`, at the middles of `count` equal ones."""
    last = int(edges[-1])
    count = min(count, last)
    middles = (np.arange(count) + 0.5) * last / count
    return values[np.searchsorted(edges, middles, side="right") - 1]


def _shortened(text: str) -> list[str]:
    """Head and tail of a text, in lines that fit; control characters shown as they are named."""
    text = printable(text)
    lines = textwrap.wrap(text, _WIDTH - 4, break_on_hyphens=False) or [""]
    if len(lines) <= 2 * _SAMPLE_LINES + 1:
        return lines
    return [*lines[:_SAMPLE_LINES], "…", *lines[-_SAMPLE_LINES:]]


def printable(text: str) -> str:
    """Line breaks as ⏎, other unprintable characters as �.

    >>> printable("a" + chr(10) + "b" + chr(7))
    'a⏎b�'
    """
    text = text.replace("\n", "⏎")
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)
