"""Dataset decomposition: rows of power-of-two lengths, each from one document.

Every document is cut into pieces whose lengths are powers of two, by the binary expansion of its
own length, largest first; pieces of one length are a bucket. A step reads rows of one bucket, as
many as make the same number of tokens: short rows cost less attention, and no row mixes documents.

    document A, 13 transitions, buckets 2^1 .. 2^3           13 = 8 + 4 + 1

    AAAAAAAA AAAA A        bucket 8: |AAAAAAAA|   bucket 4: |AAAA|   bucket 2: |A.|  (padded)
    8        4    1        step of bucket 8: 1 row      bucket 4: 2 rows     bucket 2: 4 rows

Lengths are in transitions (stored tokens - 1), so a row of 2^i transitions reads 2^i + 1 stored
tokens: its last target is the next piece's first input. (The released script cuts that token off
with each piece; here nothing is lost.)

A document of at least twice the longest bucket is first cut by chance: buckets drawn with
probability proportional to 2^-i, so that each is expected to get as many of its tokens, until what
is left is shorter than that. The draws are a function of (seed, domain, document, draw), so another
document more or less in the corpus changes no other one's cuts.

Source: Dataset Decomposition, arXiv:2405.13226; apple/ml-dataset-decomposition, get_binary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcl.data.curricula import Curriculum, GrowP2
from lcl.data.ordering import GOLDEN, mix, named_key
from lcl.data.packing import Layout

TAILS = ("pad", "drop")
MAX_LOG2 = 30
# Random draws made at once: bounds the memory that a huge document needs.
_DRAWS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """How a stage decomposes its documents.

    The stage's `sequence_length` must be 2**max_log2, and its `batch_size` counts the rows of a
    step of the longest bucket; a step of bucket i has 2**(max_log2 - i) times as many.

    Attributes:
        min_log2, max_log2: the shortest and the longest bucket, 1 <= min_log2 <= max_log2.
        curriculum: the order of the buckets (`lcl.data.curricula`).
        cycles: how often the curriculum runs through in the stage.
        tails: "pad" keeps what is left of a document (fewer than 2**min_log2 transitions) as a
            padded row of the shortest bucket; "drop" leaves it out, as the paper does. Both are
            counted.
        longest_first: the stage's first step is one of the longest bucket, so that running out of
            memory shows at once.

    Example:
        >>> Decomposition(8, 10).row_lengths, Decomposition(8, 10).rows_per_step(4)
        ((256, 512, 1024), (16, 8, 4))
    """

    min_log2: int = 8
    max_log2: int = 13
    curriculum: Curriculum = GrowP2()  # noqa: RUF009 (frozen)
    cycles: int = 8
    tails: str = "pad"
    longest_first: bool = True

    def __post_init__(self) -> None:
        _check_buckets(self.min_log2, self.max_log2, self.tails)
        if self.cycles < 1:
            raise ValueError(f"cycles is {self.cycles}; give at least 1")
        if not isinstance(self.curriculum, Curriculum):
            raise ValueError(
                f"curriculum is {self.curriculum!r}; give one of lcl.data.curricula, as GrowP2()"
            )

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Transitions of a row of each bucket, shortest first."""
        return tuple(2**i for i in range(self.min_log2, self.max_log2 + 1))

    def rows_per_step(self, batch_size: int) -> tuple[int, ...]:
        """Rows of a step of each bucket: constant tokens a step."""
        return tuple(batch_size * (2**self.max_log2 // length) for length in self.row_lengths)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the batches, as plain values to be hashed."""
        return {
            "buckets": [self.min_log2, self.max_log2],
            "curriculum": [type(self.curriculum).__name__, self.curriculum.style],
            "cycles": self.cycles,
            "tails": self.tails,
            "longest_first": self.longest_first,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class DecompositionLayout:
    """The buckets of some documents, and what became of every transition.

    Attributes:
        layouts: one `Layout` a bucket, shortest rows first; every row is one slice. A bucket may
            be empty.
        num_transitions: of the documents: those in the rows + `dropped_tokens`.

    Example:
        >>> print(decompose(np.array([13, 2]), min_log2=1, max_log2=3, seed=0))
        decomposition of 15 transitions: 4 rows, 0 dropped (0%), 1 padded with 1 cell (6.25%)
          bucket     rows    tokens   share
               2        2         3   20.0%
               4        1         4   26.7%
               8        1         8   53.3%
    """

    layouts: tuple[Layout, ...]
    num_transitions: int

    @property
    def row_lengths(self) -> tuple[int, ...]:
        return tuple(layout.row_length for layout in self.layouts)

    @property
    def num_rows(self) -> int:
        return sum(layout.num_rows for layout in self.layouts)

    @property
    def tokens(self) -> np.ndarray:
        """Transitions in each bucket, int64[n]."""
        return np.array([layout.num_tokens for layout in self.layouts], np.int64)

    @property
    def cells(self) -> np.ndarray:
        """Cells of each bucket's rows, padding included, int64[n]: what steps are counted by."""
        return np.array([layout.num_rows * layout.row_length for layout in self.layouts], np.int64)

    @property
    def dropped_tokens(self) -> int:
        """Transitions that are in no row (tails="drop")."""
        return self.num_transitions - int(self.tokens.sum())

    @property
    def num_padded_rows(self) -> int:
        """Rows that are tails (tails="pad")."""
        return int(np.count_nonzero(self.layouts[0].length < self.layouts[0].row_length))

    @property
    def padded_cells(self) -> int:
        """Cells of padding in the tails' rows."""
        shortest = self.layouts[0]
        return shortest.num_rows * shortest.row_length - shortest.num_tokens

    @property
    def mean_context(self) -> float:
        """Keys that a token sees on average, sum of n (n + 1) / 2 over the rows / tokens."""
        lengths = [layout.length.astype(np.float64) for layout in self.layouts]
        seen = sum(float((n * (n + 1)).sum()) / 2 for n in lengths)
        return seen / max(1, int(self.tokens.sum()))

    def __str__(self) -> str:
        """Return a table: rows, tokens and share of each bucket, and what was lost or padded."""
        tokens = self.tokens
        total = int(tokens.sum())
        dropped = 100 * self.dropped_tokens / max(1, self.num_transitions)
        padded = 100 * self.padded_cells / max(1, self.padded_cells + total)
        cells = "cell" if self.padded_cells == 1 else "cells"
        lines = [
            f"decomposition of {self.num_transitions:,} transitions: {self.num_rows:,} rows, "
            f"{self.dropped_tokens:,} dropped ({dropped:.3g}%), {self.num_padded_rows:,} padded "
            f"with {self.padded_cells:,} {cells} ({padded:.3g}%)",
            "  bucket     rows    tokens   share",
        ]
        for layout, count in zip(self.layouts, tokens.tolist(), strict=True):
            share = 100 * count / max(1, total)
            lines.append(f"{layout.row_length:8,} {layout.num_rows:8,} {count:9,} {share:6.1f}%")
        return "\n".join(lines)


def decompose(
    lengths_N: Sequence[int] | np.ndarray,
    *,
    min_log2: int,
    max_log2: int,
    seed: int,
    domain: str = "",
    tails: str = "pad",
) -> DecompositionLayout:
    """Cut documents into rows of power-of-two lengths, one document a row.

    Args:
        lengths_N: transitions of each document (stored tokens - 1), >= 0.
        min_log2, max_log2: rows have 2**min_log2, ..., 2**max_log2 transitions.
        seed: of the random cuts of documents of at least 2 * 2**max_log2 transitions.
        domain: the domain's name; two domains are cut independently.
        tails: "pad" or "drop" the rest of a document, shorter than 2**min_log2.

    Returns:
        The DecompositionLayout. With tails="pad" every transition of every document is in exactly
        one row; with "drop" but for each document's tail.

    Raises:
        ValueError: impossible buckets, an unknown `tails`, a negative length.

    Example:
        >>> for layout in decompose([13], min_log2=1, max_log2=3, seed=0).layouts:
        ...     print(layout.row_length, layout.start.tolist(), layout.length.tolist())
        2 [12] [1]
        4 [8] [4]
        8 [0] [8]
    """
    _check_buckets(min_log2, max_log2, tails)
    lengths_N = np.asarray(lengths_N, np.int64)
    if lengths_N.size and lengths_N.min() < 0:
        raise ValueError(
            f"a document has length {lengths_N.min()}; lengths count transitions, >= 0"
        )
    key = named_key("decompose", seed, domain)
    begin_N, cut_document, cut_start, cut_log2 = _cut_long(lengths_N, min_log2, max_log2, key)
    rest_N = lengths_N - begin_N  # < 2 ** (max_log2 + 1): its bits are its pieces
    layouts = []
    for log2 in range(min_log2, max_log2 + 1):
        document = np.flatnonzero(rest_N >> log2 & 1)
        start = begin_N[document] + (rest_N[document] >> (log2 + 1) << (log2 + 1))
        length = np.full(len(document), 2**log2, np.int32)
        if cut_log2.size:
            here = cut_log2 == log2
            document = np.concatenate([document, cut_document[here]])
            start = np.concatenate([start, cut_start[here]])
            length = np.full(len(document), 2**log2, np.int32)
        if log2 == min_log2 and tails == "pad":
            tail_N = rest_N & (2**min_log2 - 1)
            ending = np.flatnonzero(tail_N)
            document = np.concatenate([document, ending])
            start = np.concatenate([start, (lengths_N - tail_N)[ending]])
            length = np.concatenate([length, tail_N[ending].astype(np.int32)])
        layouts.append(
            Layout(2**log2, np.arange(len(document) + 1), document.astype(np.int64), start, length)
        )
    return DecompositionLayout(tuple(layouts), int(lengths_N.sum()))


def _cut_long(
    lengths_N: np.ndarray, min_log2: int, max_log2: int, key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut pieces of random buckets off documents too long for a binary expansion.

    Returns:
        (where the rest of each document begins int64[N]; document, start and bucket (log2) of each
        piece, int64[P]).
    """
    begin_N = np.zeros(len(lengths_N), np.int64)
    too_long = 2 ** (max_log2 + 1)
    documents = np.flatnonzero(lengths_N >= too_long)
    if not documents.size:
        none = np.zeros(0, np.int64)
        return begin_N, none, none, none
    # A document can't need more draws than if each took the shortest piece.
    most = (lengths_N[documents] - too_long >> min_log2) + 1
    ends = np.cumsum(most)
    pieces = []
    first = 0
    while first < len(documents):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _DRAWS_AT_ONCE, side="right")))
        block, draws = documents[first:last], most[first:last]
        document = np.repeat(block, draws)
        origin = np.repeat(np.cumsum(draws) - draws, draws)
        log2 = _draw(key, document, np.arange(len(document)) - origin, min_log2, max_log2)
        size = np.int64(1) << log2
        before = np.cumsum(size) - size
        start = before - before[origin]
        taken = lengths_N[document] - start >= too_long
        document, start, log2, size = document[taken], start[taken], log2[taken], size[taken]
        np.add.at(begin_N, document, size)
        pieces.append((document, start, log2))
        first = last
    cut_document, cut_start, cut_log2 = (
        np.concatenate(arrays) for arrays in zip(*pieces, strict=True)
    )
    return begin_N, cut_document, cut_start, cut_log2


def _draw(
    key: int, document: np.ndarray, draw: np.ndarray, min_log2: int, max_log2: int
) -> np.ndarray:
    """Draw buckets with p(log2) = 2^(max_log2 - log2) / (2^n - 1), int64: n buckets.

    A hash of (key, document, draw), twice splitmix64's finaliser: counters in, no state.
    """
    word = mix(document.astype(np.uint64) * GOLDEN + np.uint64(key))
    word = mix(word + draw.astype(np.uint64) * GOLDEN)
    num_buckets = max_log2 - min_log2 + 1
    # u is uniform on 1 .. 2^n - 1; its highest bit is m with probability 2^m / (2^n - 1).
    u = word % np.uint64(2**num_buckets - 1) + np.uint64(1)
    highest = np.frexp(u.astype(np.float64))[1] - 1  # exact: n < 53
    return max_log2 - highest.astype(np.int64)


def _check_buckets(min_log2: int, max_log2: int, tails: str) -> None:
    if not 1 <= min_log2 <= max_log2 <= MAX_LOG2:
        raise ValueError(
            f"min_log2 is {min_log2} and max_log2 {max_log2}; give 1 <= min_log2 <= max_log2 <= "
            f"{MAX_LOG2}"
        )
    if tails not in TAILS:
        raise ValueError(f"tails is {tails!r}; use {' or '.join(map(repr, TAILS))}")
