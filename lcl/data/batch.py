"""The batch: what every model, objective and evaluation receives, and how rows become one.

Legend: B rows of a batch, T transitions of a row, S slices of the batch, D domains.

A row of T = 8 with two documents and one cell of padding (bos = 256, eos = 257):

    document 1 stored  [256, 72, 105, 257]      document 2 stored  [256, 79, 107, 33, 257]

    tokens        256  72 105 | 256  79 107  33 |  0     inputs
    targets        72 105 257 |  79 107  33 257 |  0     the next token of the same document
    segment_ids     1   1   1 |   2   2   2   2 |  0     which document of the row; 0 is padding
    positions       0   1   2 |   0   1   2   3 |  0     restart in each document
    loss_weights    1   1   1 |   1   1   1   1 |  0
    source_ids      d   d   d |   d   d   d   d |  0     domain d; D + d when the row is replayed

An eos is never an input and a bos is never a target: no transition crosses documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lcl.data.ordering import named_key, shuffle_with_key
from lcl.data.packing import Layout, Slices, pack


class Batch(NamedTuple):
    """Rows of token transitions; every array is [B, T].

    Attributes:
        tokens: int32, the inputs; 0 at padding.
        targets: int32, the token after each input in its document; 0 at padding.
        segment_ids: int32, 0 = padding, 1, 2, ... = which document of the row (all 1 without
          document masking). A piece of a document counts as a document.
        positions: int32, restart at 0 in each segment.
        loss_weights: float32, 1 for a transition, 0 for padding.
        source_ids: int32, the domain index d in [0, D) of each new token, D + d of each replayed
          one; 0 at padding (whose weight is 0).
        row_index: int32 or None: the original place of each cell, where something has permuted the
          row (a balanced context mesh). None: the row is as it was.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_weights: np.ndarray
    source_ids: np.ndarray
    row_index: np.ndarray | None = None

    def permuted(self, order_T: np.ndarray) -> Batch:
        """Return the rows with their cells in another order, and `row_index` to tell of it.

            order_T      0 3 1 2
            tokens       10 11 12 13   ->   10 13 11 12      targets, positions, ... likewise:
            row_index    (none)        ->    0  3  1  2      they were made before, so none is lost

        Args:
            order_T: int[T], the place that each new cell has now.
        """
        index = self.row_index
        if index is None:
            index = np.broadcast_to(np.arange(len(order_T), dtype=np.int32), self.tokens.shape)
        return Batch(*(field[:, order_T] for field in (*self[:6], index)))


class Runs(NamedTuple):
    """The segments of a batch's rows, row after row; int64[S] each.

    row: which row; start: its first cell; length: how many cells; segment: its number in
    `segment_ids`.
    """

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    segment: np.ndarray


def segment_runs(segment_ids_BT: np.ndarray) -> Runs:
    """Find the segments of every row; padding (0) is none.

    Args:
        segment_ids_BT: int[B, T].

    Returns:
        Runs, ordered by row and cell. A segment is a run of equal numbers.

    Example:
        >>> runs = segment_runs(np.array([[1, 1, 2, 2, 2], [1, 0, 0, 0, 0]]))
        >>> runs.row.tolist(), runs.start.tolist(), runs.length.tolist()
        ([0, 0, 1], [0, 2, 0], [2, 3, 1])
    """
    segment_ids_BT = np.asarray(segment_ids_BT)
    begins = np.ones(segment_ids_BT.shape, bool)
    begins[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    flat = np.flatnonzero(begins)
    length = np.diff(flat, append=segment_ids_BT.size)
    segment = segment_ids_BT.ravel()[flat].astype(np.int64)
    row, start = np.divmod(flat, segment_ids_BT.shape[1])
    real = segment > 0
    return Runs(row[real], start[real], length[real], segment[real])


class RowTransform(Protocol):
    """What a method does to a batch on its way out: other positions, segments or cells.

    A frozen dataclass. It is called on the host, for any part of a step's rows, and must give every
    row what it would get in the whole batch: random numbers come from `key` and `places_B` only.
    """

    def content_length(self, row_length: int) -> int:
        """Return how many of a row's cells documents may fill, or refuse the row's length."""
        ...

    def __call__(
        self, batch: Batch, *, step: int, num_steps: int, key: int, places_B: np.ndarray
    ) -> Batch:
        """Return the transformed batch; the given one is left as it is.

        Args:
            batch: rows [B, T], with no more than `content_length(T)` cells filled.
            step: step within the stage, from 0.
            num_steps: the stage's length.
            key: 64-bit key of the seed and the stage.
            places_B: int64[B], the rows' numbers in the stage (step * rows of a step + row).
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, as plain values to be hashed."""
        ...


class TokenStore(Protocol):
    """What this module needs of a `lcl.data.store.Store`."""

    @property
    def domain(self) -> str: ...
    @property
    def tokens(self) -> np.ndarray: ...  # uint16 or uint32, flat
    @property
    def offsets(self) -> np.ndarray: ...  # int64[N + 1]
    @property
    def lengths(self) -> np.ndarray: ...  # int64[N], stored tokens


class RowGroup(NamedTuple):
    """Rows that come from one store.

    tokens, offsets: the store's arrays; rows: int64[b], their places in the batch; slices: what
    they hold (slices.row counts 0..b-1); source_id: the mark of all their tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    slices: Slices
    source_id: int


def gather_rows(
    groups: Sequence[RowGroup], num_rows: int, row_length: int, *, document_mask: bool = True
) -> Batch:
    """Copy the tokens of a batch's rows out of the stores.

    One gather a store for all its rows at once: no Python runs per token or per document. A row's
    slices and its padding are runs that fill it, so all arrays are made flat, and are whole rows.

        row         document 7         document 4   padding
        runs        [5 tokens         ][3          ][4        ]
        segments     1  1  1  1  1      2  2  2      0  0  0  0
        positions    0  1  2  3  4      0  1  2      0  0  0  0
        source      70 71 72 73 74     40 41 42      (any)           places in the store's tokens

    Args:
        groups: the rows, by store; together their `rows` are 0 .. num_rows - 1, each once. Rows
          left out are padding.
        num_rows: B.
        row_length: T, at least the transitions of any row.
        document_mask: False marks the whole row as one segment, with positions along the row.

    Returns:
        A Batch of [num_rows, row_length].
    """
    groups = [group for group in groups if len(group.rows)]
    shape = (num_rows, row_length)
    if not groups:
        none = np.zeros((5, *shape), np.int32)
        weights = np.zeros(shape, np.float32)
        return Batch(none[0], none[1], none[2], none[3], weights, none[4])
    # From here on "row" counts gathered rows: group after group.
    bases = np.cumsum([0] + [len(group.rows) for group in groups])
    num_gathered = int(bases[-1])
    row_S = np.concatenate([g.slices.row + base for g, base in zip(groups, bases, strict=False)])
    length_S = np.concatenate([g.slices.length for g in groups]).astype(np.int64)
    slices_b = np.bincount(row_S, minlength=num_gathered)
    last_b = np.cumsum(slices_b)
    first_b = last_b - slices_b  # the first slice of each row
    tokens_b = np.add.reduceat(length_S, first_b)
    assert tokens_b.max() <= row_length, "a layout's row is longer than the batch's"

    # Runs: where the slices are among them, and where each row's padding is.
    run_S = np.arange(len(row_S)) + row_S
    run_b = last_b + np.arange(num_gathered)
    length_R = np.empty(len(row_S) + num_gathered, np.int64)
    length_R[run_S], length_R[run_b] = length_S, row_length - tokens_b
    begin_R = np.cumsum(length_R) - length_R
    tokens, targets = _gather_tokens(groups, bases * row_length, begin_R, length_R, run_S)
    segment_R = np.zeros(len(length_R), np.int32)
    segment_R[run_S] = np.arange(1, len(row_S) + 1) - first_b[row_S] if document_mask else 1
    segments = np.repeat(segment_R, length_R)
    if not document_mask:  # positions count from the row's first run
        begin_R = np.repeat(begin_R[first_b + np.arange(num_gathered)], slices_b + 1)
    positions = np.arange(len(segments), dtype=np.int32)
    positions -= np.repeat(begin_R.astype(np.int32), length_R)
    marks = np.repeat([g.source_id for g in groups], np.diff(bases)).astype(np.int32)
    sources = np.repeat(marks, row_length)
    made = [tokens, targets, segments, positions, np.ones(len(segments), np.float32), sources]
    padding = np.flatnonzero(segments == 0)
    for array in made:
        array[padding] = 0
    made = [array.reshape(num_gathered, row_length) for array in made]

    place = np.concatenate([g.rows for g in groups])
    if num_gathered < num_rows or (place[1:] < place[:-1]).any():
        gathered, made = made, [np.zeros(shape, array.dtype) for array in made]
        for array, rows in zip(made, gathered, strict=True):
            array[place] = rows
    return Batch(*made)


def _gather_tokens(
    groups: Sequence[RowGroup],
    cells_G: np.ndarray,
    begin_R: np.ndarray,
    length_R: np.ndarray,
    run_S: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Copy inputs and targets of all rows, one after the other: two int32, anything at padding.

    Args:
        groups: non-empty, each with at least one slice.
        cells_G: int64[groups + 1], where each group's cells begin, and the end.
        begin_R, length_R: int64[R], the runs.
        run_S: int64[S], which runs are slices.
    """
    source_S = np.concatenate([g.offsets[g.slices.document] + g.slices.start for g in groups])
    shift_R = -begin_R
    shift_R[run_S] += source_S
    source = np.repeat(shift_R, length_R)
    source += np.arange(len(source))
    tokens, targets = (np.empty(len(source), np.int32) for _ in range(2))
    for group, begin, end in zip(groups, cells_G[:-1], cells_G[1:], strict=True):
        # "clip": what padding would read may lie outside a small store.
        tokens[begin:end] = group.tokens.take(source[begin:end], mode="clip")
    # The targets are the tokens one place on, except at the end of each slice.
    targets[:-1] = tokens[1:]
    end_S = (begin_R + length_R)[run_S]
    first = 0
    for group in groups:
        own = slice(first, first + len(group.slices.row))
        first = own.stop
        last = source_S[own] + length_R[run_S[own]]
        targets[end_S[own] - 1] = group.tokens[last]
    return tokens, targets


def layout_group(
    store: TokenStore, layout: Layout, layout_rows: Any, rows: Any, source_id: int
) -> RowGroup:
    """Describe the rows `layout_rows` of a layout, to be put at the places `rows` of a batch."""
    return RowGroup(
        np.asarray(store.tokens).view(np.ndarray),
        np.asarray(store.offsets).view(np.ndarray),
        np.asarray(rows, np.int64),
        layout.rows(layout_rows),
        source_id,
    )


def eval_batches(
    store: TokenStore,
    *,
    sequence_length: int,
    batch_size: int,
    num_rows: int,
    source_id: int = 0,
    document_mask: bool = True,
) -> list[Batch]:
    """Make the fixed batches on which a domain's loss is evaluated.

    The documents come in an order that depends on the domain's name only (no seed: two runs are
    evaluated on the same text), as many as fill `num_rows`, packed best-fit. So that one long
    document does not stand for a domain, each gives at most its first eighth of num_rows *
    sequence_length transitions (at least one row); the cap is lifted when the store cannot fill the
    rows otherwise.

        order 4 1 7 ...   capped and packed   |4444444|1177777|...   num_rows rows (fewer if the
                                                                     store is small), then padding

    Args:
        store: usually a domain's "heldout" split.
        sequence_length: T >= 2.
        batch_size: rows of each batch; the last is filled up with rows of padding (weight 0).
        num_rows: how many rows at most, >= 1.
        source_id: the mark of all tokens.
        document_mask: as in `gather_rows`.

    Returns:
        A list of Batches of [batch_size, sequence_length], the same on every call.

    Raises:
        ValueError: the store has nothing to predict, or a number is too small.
    """
    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
        ("num_rows", num_rows, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    available = np.maximum(np.asarray(store.lengths, np.int64) - 1, 0)
    if not available.sum():
        raise ValueError(
            f"domain {store.domain!r} has no tokens to evaluate on; prepare more documents of it "
            "or leave it out of the evaluation"
        )
    wanted = num_rows * sequence_length
    lengths = np.minimum(available, max(sequence_length, wanted // 8))
    if lengths.sum() < wanted:
        lengths = available
    order = shuffle_with_key(len(lengths), named_key("heldout", store.domain, bits=128))
    taken = int(np.searchsorted(np.cumsum(lengths[order]), wanted)) + 1
    chosen = order[:taken]
    layout = pack(lengths[chosen], sequence_length, order_N=np.arange(len(chosen)))
    count = min(num_rows, layout.num_rows)
    # Rows of whole pieces come last in a layout: spread the choice, or long documents would be
    # dropped.
    spread = shuffle_with_key(layout.num_rows, named_key("heldout rows", store.domain, bits=128))
    batches = []
    for begin in range(0, count, batch_size):
        rows = np.sort(spread[:count])[begin : begin + batch_size]
        slices = layout.rows(rows)
        group = RowGroup(
            np.asarray(store.tokens).view(np.ndarray),
            np.asarray(store.offsets).view(np.ndarray),
            np.arange(len(rows)),
            slices._replace(document=chosen[slices.document]),
            source_id,
        )
        batches.append(
            gather_rows([group], batch_size, sequence_length, document_mask=document_mask)
        )
    return batches
