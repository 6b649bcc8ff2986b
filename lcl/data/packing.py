"""Layouts: rows of one length, each a list of slices (document, start, length).

Lengths are counted in *transitions*: a stored document of n tokens, [bos] + text + [eos], has n - 1
of them (from input token i to target token i + 1). A slice (document, start, length) reads inputs
tokens[start : start + length] and targets tokens[start + 1 : start + length + 1]. Every transition
of every document is in exactly one slice: nothing is dropped, nothing is repeated within an epoch.

    documents   A: 11 transitions   B: 5   C: 3   D: 2          row_length 8

    best_fit    row 0 |AAABBBBB|    no document is cut unless it is longer than a row (A: 8 + 3);
                row 1 |CCCDD...|    longest first, each to the fullest row with room for it
                row 2 |AAAAAAAA|

    first_fit   row 0 |AAACCCDD|    cut as best_fit does; in the given order, each to the first row
                row 1 |BBBBB...|    with room for it: rows follow the order, fill is lower
                row 2 |AAAAAAAA|

    concat      row 0 |AAAAAAAA|    documents one after the other, cut at every row end;
                row 1 |AAABBBBB|    only the last row may have padding (.)
                row 2 |CCCDD...|
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import string
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

METHODS = ("best_fit", "first_fit", "concat")
_ARRAYS = ("row_offsets", "document", "start", "length")
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


class TornLayoutError(ValueError):
    """A layout's directory is incomplete or does not match its own digest."""


class Slices(NamedTuple):
    """The slices of some rows, row after row. All arrays have length S.

    row: int64, which of the asked rows (0, 1, ...) the slice is in; document, start: int64;
    length: int32 (transitions).
    """

    row: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Rows as slices of documents: a table of integers, independent of the tokens themselves.

    Attributes:
        row_length: T, transitions a row holds.
        row_offsets: int64[R + 1]; row r has the slices row_offsets[r] : row_offsets[r + 1].
        document, start: int64[S]; length: int32[S], all >= 1.

    Example:
        >>> print(pack(np.array([11, 5, 3, 2]), 8, method="concat"))
        Layout of 3 rows x 8: 5 slices of 4 documents (1 cut), fill 0.875
          row 0 |AAAAAAAA|
          row 1 |AAABBBBB|
          row 2 |CCCDD...|
    """

    row_length: int
    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.row_offsets) - 1

    @functools.cached_property
    def num_tokens(self) -> int:
        """Transitions in all rows: what one epoch trains on."""
        return int(self.length.sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the rows' cells that hold a transition (1 - padding)."""
        return self.num_tokens / max(1, self.num_rows * self.row_length)

    @property
    def num_padding(self) -> int:
        """Cells that hold no transition."""
        return self.num_rows * self.row_length - self.num_tokens

    @functools.cached_property
    def num_cuts(self) -> int:
        """Slices that do not begin their document: how often text was cut."""
        return int(np.count_nonzero(self.start))

    @functools.cached_property
    def num_cut_documents(self) -> int:
        """Documents that are in more than one slice (longer than a row, or cut at a row's end)."""
        return int(np.unique(self.document[self.start > 0]).size)

    def rows(self, indices: Any) -> Slices:
        """Return the slices of the rows `indices` (int[B], repeats allowed), row after row.

        Example:
            >>> layout = pack(np.array([11, 5, 3, 2]), 8, method="concat")
            >>> layout.rows([2, 1]).document.tolist(), layout.rows([2, 1]).row.tolist()
            ([2, 3, 0, 1], [0, 0, 1, 1])
        """
        indices = np.asarray(indices, np.int64)
        first = self.row_offsets[indices]
        count = self.row_offsets[indices + 1] - first
        row = np.repeat(np.arange(len(indices)), count)
        # Ragged gather: slice j of the answer is first[row] + (j - the number of slices before
        # row).
        index = np.arange(len(row)) + (first - np.cumsum(count) + count)[row]
        return Slices(row, self.document[index], self.start[index], self.length[index])

    def tokens_in(self, indices: Any) -> np.ndarray:
        """Return how many transitions each of the rows `indices` holds, int64[B]."""
        slices = self.rows(indices)
        counts = np.bincount(slices.row, weights=slices.length, minlength=len(indices))
        return counts.astype(np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the content: equal layouts have equal fingerprints, on disk or in memory."""
        hasher = hashlib.blake2b(f"layout 1 {self.row_length}".encode(), digest_size=16)
        for name in _ARRAYS:
            hasher.update(np.ascontiguousarray(getattr(self, name)).data)
        return hasher.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout as .npy files under the new directory `path`, atomically.

        Everything is written and synced beside `path`, then renamed: a reader sees all or nothing.
        If another process published `path` meanwhile, that one is kept (callers name a layout's
        directory by what decides its content, so both are the same).
        """
        path = os.path.abspath(os.fspath(path))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".plan-", dir=os.path.dirname(path))
        try:
            for name in _ARRAYS:
                with open(os.path.join(temporary, f"{name}.npy"), "wb") as file:
                    np.save(file, getattr(self, name))
                    file.flush()
                    os.fsync(file.fileno())
            meta = {"version": 1, "row_length": self.row_length, "fingerprint": self.fingerprint}
            with open(os.path.join(temporary, "meta.json"), "w", encoding="utf-8") as file:
                json.dump(meta, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o755)  # mkdtemp makes it private
            try:
                os.rename(temporary, path)
            except OSError:
                if not os.path.isdir(path):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Layout:
        """Open a saved layout, memory-mapped, and check it against its digest.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            TornLayoutError: it is incomplete or was altered.
        """
        path = os.fspath(path)
        if not os.path.isdir(path):
            raise FileNotFoundError(path)
        try:
            with open(os.path.join(path, "meta.json"), encoding="utf-8") as file:
                meta = json.load(file)
            arrays = [_open_array(os.path.join(path, f"{name}.npy")) for name in _ARRAYS]
            layout = cls(int(meta["row_length"]), *arrays)
            intact = layout.fingerprint == meta["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise TornLayoutError(f"plan {path} is torn ({error}); delete it") from error
        if not intact:
            raise TornLayoutError(f"plan {path} does not match its fingerprint; delete it")
        return layout

    def __str__(self) -> str:
        """Draw the first rows: a letter a document (cells are merged when a row is long)."""
        documents = np.unique(self.document)
        lines = [
            f"Layout of {self.num_rows:,} rows x {self.row_length:,}: "
            f"{len(self.document):,} slices of {len(documents):,} documents "
            f"({self.num_cut_documents:,} cut), fill {self.fill:.4g}"
        ]
        shown, width = min(self.num_rows, 12), min(self.row_length, 64)
        for row in range(shown):
            slices = self.rows([row])
            names = np.searchsorted(documents, slices.document) % len(_LETTERS)
            cells = "".join(
                _LETTERS[n] * k for n, k in zip(names, slices.length.tolist(), strict=True)
            ).ljust(self.row_length, ".")
            drawn = "".join(
                cells[(2 * i + 1) * self.row_length // (2 * width)] for i in range(width)
            )
            lines.append(f"  row {row} |{drawn}|")
        if shown < self.num_rows:
            lines.append(f"  ... and {self.num_rows - shown:,} rows more")
        return "\n".join(lines)


def _open_array(path: str) -> np.ndarray:
    """Memory-map an .npy file as a plain ndarray (np.memmap's own indexing is slower)."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def pack(
    lengths_N: Sequence[int] | np.ndarray,
    row_length: int,
    *,
    method: str = "best_fit",
    order_N: np.ndarray | None = None,
) -> Layout:
    """Lay documents out in rows of `row_length` transitions.

    Args:
        lengths_N: transitions of each document (stored tokens - 1), >= 0.
        row_length: T, >= 1.
        method: "best_fit": global best-fit-decreasing ("Fewer Truncations", arXiv:2404.10830); a
          document is cut only if it is longer than a row (T-pieces and a remainder). "first_fit":
          cut likewise, but placed in the given order, each in the first row with room. "concat":
          concatenate and chunk; documents are cut wherever a row ends.
        order_N: int[M], the documents to lay out (default 0, 1, ..., N - 1). Usually a permutation;
          a document may come several times, each time as a document of its own, or not at all.
          concat: the order of concatenation. first_fit: the order of placing. best_fit: breaks ties
          between equal lengths. The slices within a row are in this order always.

    Returns:
        A Layout whose slices hold every transition of every document in order_N exactly once (as
        often as it comes). Rows come in no meaningful order: the stream shuffles them. O(M log M),
        whichever the method.

    Raises:
        ValueError: unknown method, row_length < 1, a negative length, or order_N names a document
          that is not there.

    Example:
        >>> print(pack(np.array([11, 5, 3, 2]), 8))
        Layout of 3 rows x 8: 5 slices of 4 documents (1 cut), fill 0.875
          row 0 |AAABBBBB|
          row 1 |CCCDD...|
          row 2 |AAAAAAAA|
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    if method not in METHODS:
        raise ValueError(f"packing {method!r} is unknown; use one of {', '.join(METHODS)}")
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}; give at least 1")
    if lengths_N.size and lengths_N.min() < 0:
        raise ValueError(
            f"a document has length {lengths_N.min()}; lengths count transitions, >= 0"
        )
    order_N = np.arange(len(lengths_N)) if order_N is None else np.asarray(order_N, np.int64)
    strange = (order_N < 0) | (order_N >= len(lengths_N))
    if strange.any():
        raise ValueError(
            f"order_N names document {order_N[strange][0]}; there are {len(lengths_N)}, from 0 on"
        )
    order_N = order_N[lengths_N[order_N] > 0]
    if method == "concat":
        return _pack_concat(lengths_N, row_length, order_N)
    return _pack_whole(lengths_N, row_length, order_N, best=method == "best_fit")


def _pack_concat(lengths_N: np.ndarray, row_length: int, order_N: np.ndarray) -> Layout:
    """Cut the concatenated stream at document ends and at multiples of row_length."""
    ends = np.cumsum(lengths_N[order_N])
    total = int(ends[-1]) if len(ends) else 0
    num_rows = -(-total // row_length)
    row_ends = np.minimum(np.arange(1, num_rows + 1) * row_length, total)
    # Where a slice ends in the concatenated stream; a stable sort merges the two sorted runs.
    cuts = np.sort(np.concatenate([ends, row_ends]), kind="stable")
    cuts = cuts[np.append(cuts[1:] != cuts[:-1], True)] if len(cuts) else cuts
    begins = np.concatenate([[0], cuts[:-1]]) if len(cuts) else cuts
    place = np.searchsorted(ends, begins, side="right")  # which document, in order
    document = order_N[place]
    start = begins - (ends[place] - lengths_N[document])
    row_offsets = np.concatenate([[0], np.searchsorted(cuts, row_ends, side="right")])
    return Layout(
        row_length,
        row_offsets.astype(np.int64),
        document.astype(np.int64),
        start.astype(np.int64),
        (cuts - begins).astype(np.int32),
    )


def _pack_whole(
    lengths_N: np.ndarray, row_length: int, order_N: np.ndarray, *, best: bool
) -> Layout:
    """Cut documents longer than a row, bin the remainders, and sort the slices by row."""
    lengths = lengths_N[order_N]
    num_full, rest = np.divmod(lengths, row_length)
    # Whole-row pieces: each is a row of its own, after the binned rows.
    full_document = np.repeat(order_N, num_full)
    piece = np.arange(len(full_document)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    # Remainders (the whole document, when it fits).
    left = np.flatnonzero(rest)
    bin_of = np.empty(len(order_N), np.int64)
    if best:  # longest first; equal lengths keep the order
        shortness = (row_length - rest[left]).astype(np.min_scalar_type(row_length))
        decreasing = left[np.argsort(shortness, kind="stable")]  # a radix sort at 16 bits
        counts = np.bincount(rest[left])
        values = np.flatnonzero(counts)[::-1]
        bin_of[decreasing], num_bins = _best_fit_bins(
            values.tolist(), counts[values].tolist(), row_length
        )
    else:
        bin_of[left], num_bins = _first_fit_bins(rest[left].tolist(), row_length)
    # `left` is in order, so a stable sort by bin leaves each row's slices in order: no row has its
    # longest document always first, which would tie a document's length to its place in the row.
    by_bin = left[np.argsort(bin_of[left], kind="stable")]
    document = np.concatenate([order_N[by_bin], full_document])
    start = np.concatenate([(num_full * row_length)[by_bin], piece * row_length])
    length = np.concatenate([rest[by_bin], np.full(len(piece), row_length, np.int64)])
    bin_ends = np.cumsum(np.bincount(bin_of[left], minlength=num_bins))
    full_ends = np.arange(1, len(piece) + 1) + len(by_bin)
    row_offsets = np.concatenate([[0], bin_ends, full_ends])
    return Layout(
        row_length, row_offsets.astype(np.int64), document, start, length.astype(np.int32)
    )


def _first_fit_bins(items: list[int], capacity: int) -> tuple[list[int], int]:
    """First fit, in order: each item into the lowest-numbered bin with room for it.

    A complete binary tree over the bins holds in each node the most room below it. Going down, the
    left child is taken whenever it has room enough. Unopened bins are in it with all their room, so
    opening one is no special case; and with at least one bin too many, an item always finds one.

        room of bins 0 .. 3          8                  an item of 3: 8 at the top, 3 at the left,
                                 3       8              then 1 is too little, so bin 1
                               1   3   6   8

    Args:
        items: sizes, each in [1, capacity].
        capacity: room of an empty bin.

    Returns:
        (bin of each item; number of bins). O(n log n).
    """
    # Two bins hold more than one can: the later's first item had no room in the earlier.
    most = min(len(items), 2 * sum(items) // capacity + 1)
    size = 1 << most.bit_length()
    room = [capacity] * (2 * size)
    out: list[int] = []
    for item in items:
        node = 1
        while node < size:
            node += node
            if room[node] < item:
                node += 1
        out.append(node - size)
        left = room[node] - item
        room[node] = left
        while node > 1:
            sibling = room[node ^ 1]
            node >>= 1
            left = left if left > sibling else sibling
            if room[node] == left:
                break
            room[node] = left
    return out, max(out, default=-1) + 1


def _best_fit_bins(values: list[int], counts: list[int], capacity: int) -> tuple[list[int], int]:
    """Best-fit-decreasing over groups of equal items.

    Best fit puts an item into the fullest bin with room for it. Bins of equal room are alike, so
    bins are kept in classes by room, and the classes that are not empty are the set bits of one
    integer: the best class for an item of v is the lowest set bit at or above v. And since v is the
    smallest item so far, once a bin of room r is the best for one item of v, it stays the best
    until it has taken r // v of them: a whole group of equal items goes into a whole class of bins
    in one step.

        room     0  1  2  3  4  5       items of 2, three of them: lowest bit >= 2 is room 3
        bins           [ ] [7,4]        bins 7, 4 take one each (3 // 2 = 1) and move to room 1;
        bits     -  0  0  1  0  0       no class is left, so a new bin takes the third

    Args:
        values: distinct item sizes, decreasing, each in [1, capacity].
        counts: how many items of each size.
        capacity: room of an empty bin.

    Returns:
        (bin of each item, in the order of values; number of bins). O(items + steps * capacity / 64)
        where steps <= items.
    """
    bins_of_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when bins_of_room[r] is not empty
    out: list[int] = []
    num_bins = 0
    for value, count in zip(values, counts, strict=True):
        while count:
            above = rooms >> value
            if above:
                room = value + (above & -above).bit_length() - 1
                bins = bins_of_room[room]
            else:
                room = capacity
                needed = -(-count // (capacity // value))
                bins = list(range(num_bins, num_bins + needed))
                num_bins += needed
            each = room // value
            num_filled = min(len(bins), count // each)
            filled = bins[len(bins) - num_filled :]
            del bins[len(bins) - num_filled :]  # from the end: the cost is what is taken
            out += filled if each == 1 else [b for b in filled for _ in range(each)]
            count -= num_filled * each
            moves = [(filled, room - each * value)]
            if count and bins:  # fewer than `each` items are left: the next bin takes them all
                last = bins.pop()
                out += [last] * count
                moves.append(([last], room - count * value))
                count = 0
            if above and not bins:
                rooms &= ~(1 << room)
            for moved, new_room in moves:
                if moved and new_room:
                    bins_of_room.setdefault(new_room, []).extend(moved)
                    rooms |= 1 << new_room
    return out, num_bins
