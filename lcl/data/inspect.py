"""What the data of a run looks like, as tables: lengths, buckets, fill, truncation, sources, rows.

Pure arithmetic over stores, layouts and streams; `lcl.report.data_page` draws what is counted here,
and `lcl data report` prints it. Everything is in transitions, the unit that rows are made of (a
stored document of n tokens has n - 1).

    document  |bos a b c d e f eos|      7 transitions, rows of 4, best fit:

    row 0     |bos a b c|                first piece: starts where the document starts
    row 1     |d e f| pad                second piece: its 3 transitions cannot see the first 4

    fill 7/8; padding 1; cut documents 1 of 1, needlessly cut 0 (no row could hold it);
    tokens after a cut 3 of 7; mean context (1+2+3+4+1+2+3)/7
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lcl.data.packing import Layout
from lcl.data.stream import Stream

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


class Lengths(NamedTuple):
    """The lengths of a domain's documents, in transitions.

    edges: int64[K + 1]: bin k holds the lengths edges[k] <= n < edges[k + 1], powers of two.
    documents, tokens: int64[K], of each bin.
    quantiles: int64[5]: shortest, 10%, median, 90%, longest.
    """

    edges: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray
    quantiles: np.ndarray

    @property
    def num_documents(self) -> int:
        return int(self.documents.sum())

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())


def length_table(lengths_N: np.ndarray) -> Lengths:
    """Count documents and their transitions by powers of two.

    Args:
        lengths_N: int[N], transitions of each document, >= 0; those of 0 are left out.

    Returns:
        A `Lengths`; one empty bin when there is nothing to count.

    Example:
        >>> table = length_table(np.array([1, 3, 3, 6]))
        >>> table.edges.tolist(), table.documents.tolist(), table.tokens.tolist()
        ([1, 2, 4, 8], [1, 2, 1], [1, 6, 6])
    """
    lengths = np.asarray(lengths_N, np.int64)
    lengths = np.sort(lengths[lengths > 0])
    if not len(lengths):
        none = np.zeros(1, np.int64)
        return Lengths(np.array([1, 2]), none, none, np.zeros(5, np.int64))
    low, high = (int(n).bit_length() - 1 for n in (lengths[0], lengths[-1]))
    edges = np.int64(1) << np.arange(low, high + 2)
    cuts = np.searchsorted(lengths, edges)
    sums = np.concatenate([[0], np.cumsum(lengths)])[cuts]
    places = np.round(np.array(_QUANTILES) * (len(lengths) - 1)).astype(int)
    return Lengths(edges, np.diff(cuts), np.diff(sums), lengths[places])


class LayoutLine(NamedTuple):
    """How well documents lie in rows; the words are those of the picture at the file's top.

    rows, cells (rows x length, summed over buckets), tokens (transitions laid out), padding (cells
    without one), documents (with at least one transition), cut_documents, needless_cuts (cut though
    shorter than a row), cut_tokens (in pieces that are not a document's first), dropped_tokens (in
    no row: the tails of a decomposition), mean_context (tokens a transition can see, itself
    included, when documents are masked).
    """

    rows: int
    cells: int
    tokens: int
    padding: int
    documents: int
    cut_documents: int
    needless_cuts: int
    cut_tokens: int
    dropped_tokens: int
    mean_context: float

    @property
    def fill(self) -> float:
        """Share of the cells that hold a transition."""
        return self.tokens / max(1, self.cells)


def layout_line(layouts: Sequence[Layout], lengths_N: np.ndarray) -> LayoutLine:
    """Describe one layout, or the buckets of one decomposition.

    Args:
        layouts: over the same documents; several only when each has rows of another length.
        lengths_N: int[N], transitions of each document.

    Example:
        >>> from lcl.data import pack
        >>> lengths = np.array([11, 5, 3, 2])
        >>> line = layout_line([pack(lengths, 8, method="concat")], lengths)
        >>> line.padding, line.cut_documents, line.needless_cuts, line.cut_tokens
        (3, 1, 0, 3)
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    longest = max((layout.row_length for layout in layouts), default=1)
    pieces_N = np.zeros(len(lengths_N), np.int64)
    laid_N = np.zeros(len(lengths_N), np.int64)
    cut_tokens, contexts = 0, 0.0
    for layout in layouts:
        length = np.asarray(layout.length, np.int64)
        pieces_N += np.bincount(layout.document, minlength=len(lengths_N))
        laid_N += np.bincount(layout.document, length, len(lengths_N)).astype(np.int64)
        cut_tokens += int(length[np.asarray(layout.start) > 0].sum())
        contexts += float((length * (length + 1.0) / 2).sum())
    tokens = sum(layout.num_tokens for layout in layouts)
    cells = sum(layout.num_rows * layout.row_length for layout in layouts)
    # An order with repeats lays a document out several times: only what is in no row is dropped.
    cut = pieces_N > np.maximum(1, laid_N // np.maximum(1, lengths_N))
    return LayoutLine(
        rows=sum(layout.num_rows for layout in layouts),
        cells=cells,
        tokens=tokens,
        padding=cells - tokens,
        documents=int(np.count_nonzero(lengths_N)),
        cut_documents=int(cut.sum()),
        needless_cuts=int((cut & (lengths_N <= longest)).sum()),
        cut_tokens=cut_tokens,
        dropped_tokens=int(np.maximum(lengths_N - laid_N, 0).sum()),
        mean_context=contexts / max(1, tokens),
    )


class BucketLine(NamedTuple):
    """One row length of a domain: rows of it, their transitions and their padding."""

    row_length: int
    rows: int
    tokens: int
    padding: int
    documents: int


def bucket_table(layouts: Sequence[Layout]) -> list[BucketLine]:
    """One line a layout, the longest rows first (an empty bucket has a line of zeros).

    Example:
        >>> from lcl.data import pack
        >>> bucket_table([pack([11, 5], 8)])
        [BucketLine(row_length=8, rows=2, tokens=16, padding=0, documents=2)]
    """
    return [
        BucketLine(
            layout.row_length,
            layout.num_rows,
            layout.num_tokens,
            layout.num_rows * layout.row_length - layout.num_tokens,
            int(np.unique(layout.document).size),
        )
        for layout in sorted(layouts, key=lambda layout: -layout.row_length)
    ]


class StageLayouts(NamedTuple):
    """The rows a stage reads of one domain.

    layouts: one, or one a bucket; num_rows: how many rows the stage reads, repeats included.
    """

    domain: str
    layouts: tuple[Layout, ...]
    num_rows: int


class TokensByStep(NamedTuple):
    """Trained transitions of each domain in stretches of steps; sums equal the stream's ledger.

    edges: int64[P + 1]: stretch p holds the steps edges[p] <= t < edges[p + 1].
    new, replayed: int64[P, D].
    """

    edges: np.ndarray
    new: np.ndarray
    replayed: np.ndarray


def stage_layouts(stream: Stream, index: int) -> list[StageLayouts]:
    """The rows that a stage's new ones are taken from, domain by domain."""
    stage, plans = stream._stages[index], stream._plans
    found = {domain: made.layouts for domain, made in stage.decomposed.items()}
    rows: dict[str, int] = {}
    for bucket in stage.buckets.values():
        counts = bucket.counts_before(bucket.num_steps).tolist()
        for p, count in zip(bucket.plans.tolist(), counts, strict=True):
            domain = stream.domains[plans[p].domain]
            found.setdefault(domain, (plans[p].layout,))
            rows[domain] = rows.get(domain, 0) + count
    return [StageLayouts(domain, found[domain], rows.get(domain, 0)) for domain in found]


def tokens_by_step(stream: Stream, num_points: int = 160) -> TokensByStep:
    """Count what a stream reads over its steps, by domain, new and replayed apart.

    Args:
        stream: the stream.
        num_points: at most so many stretches, about equally long, and the stages' borders.
    """
    edges = np.linspace(0, stream.num_steps, min(num_points, stream.num_steps) + 1).astype(int)
    edges = np.unique(np.concatenate([edges, stream.stage_starts]))
    ledgers = [stream.ledger(int(t)) for t in edges]
    new, replayed = (
        np.diff([[int(led[d][kind]) for d in stream.domains] for led in ledgers], axis=0)
        for kind in ("new_tokens", "replayed_tokens")
    )
    return TokensByStep(edges, new, replayed)


class Piece(NamedTuple):
    """A stretch of a sample row: text of one document, or what a transform has put there (id None).

    start, length: in transitions; whole: of the whole document.
    """

    document_id: int | None
    start: int
    length: int
    whole: int
    text: str


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One row of a batch, decoded, with its documents' borders."""

    stage: str
    step: int
    place: int
    domain: str
    epoch: int
    replay: bool
    row_length: int
    pieces: tuple[Piece, ...]

    @property
    def padding(self) -> int:
        return self.row_length - sum(piece.length for piece in self.pieces)


def sample_rows(stream: Stream, data: Any, step: int, places: Sequence[int]) -> list[SampleRow]:
    """Decode rows of a step's batch, piece by piece.

    Args:
        stream: where the rows are read.
        data: the stores' `Data`: for the tokenizer and the whole documents' lengths.
        step: of the stream.
        places: which rows of the batch.

    Returns:
        One `SampleRow` a place.
    """
    tokenizer = data.tokenizer()
    rows_B = np.asarray(places, np.int64)
    batch, origins = stream.batch(step, rows_B), stream.rows(step, rows_B)
    stage = stream.stage_names[stream.stage_at(step)]
    wholes: dict[str, dict[int, int]] = {}
    rows = []
    for i, (place, origin) in enumerate(zip(rows_B.tolist(), origins, strict=True)):
        if origin.domain not in wholes:
            store = data.open(origin.domain, "train")
            ids = {one for o in origins if o.domain == origin.domain for one, _, _ in o.slices}
            index = np.flatnonzero(np.isin(store.document_ids, list(ids)))
            lengths = np.maximum(np.asarray(store.lengths)[index] - 1, 0).tolist()
            ids_there = np.asarray(store.document_ids)[index].tolist()
            wholes[origin.domain] = dict(zip(ids_there, lengths, strict=True))
        # Cells that hold something: a segment of 0 is padding.
        used = np.flatnonzero(batch.segment_ids[i])
        tokens = batch.tokens[i][used]
        pieces, at = [], 0
        for document_id, start, length in origin.slices:
            whole = wholes[origin.domain][document_id]
            text = tokenizer.decode(tokens[at : at + length])
            pieces.append(Piece(document_id, start, length, whole, text))
            at += length
        if at < len(tokens):  # a transform has added a prompt: what is to be predicted there
            text = tokenizer.decode(batch.targets[i][used][at:])
            pieces.append(Piece(None, 0, len(tokens) - at, len(tokens) - at, text))
        rows.append(
            SampleRow(
                stage,
                step,
                place,
                origin.domain,
                origin.epoch,
                bool(origin.replay),
                batch.tokens.shape[1],
                tuple(pieces),
            )
        )
    return rows
