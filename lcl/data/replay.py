"""Replay: earlier stages' rows again, as an index sampler over what was seen.

Nothing is copied and nothing is buffered. What a stage may replay is decided before the run: the
rows that the stages before it will have used. So replay costs no memory, survives any restart, and
cannot silently stop.

    stage 0   used rows of a:  3 0 4          (3 of 5 rows: 1 and 2 are unseen and stay unseen)
    stage 1   used rows of b:  1 0 1 0 1      (2 rows, 2.5 epochs: each is one row of the pool)
              pool             a3 a0 a4       (only what came before)
    stage 2   pool             a3 a0 a4 b1 b0
              replayed         a4 b0 a3 b1 a0 | b1 a0 a3 b0 a4 | ...   every row once in each pass

Every row of the pool is replayed once before any is replayed twice: the sampler is a keyed
permutation of the pool, a new one each pass, with no favour for recent rows. Other pools than
"every row that was read" are a matter of `Replay.buffer`: see replay_buffers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.ordering import shuffle_with_key
from lcl.data.packing import Layout, Slices, pack
from lcl.data.plans import Plan, rows_at
from lcl.data.replay_buffers import (
    Buffer,
    Everything,
    History,
    Pool,
    ReadFn,
    Used,
    whole_epoch,
)

__all__ = ["MODES", "Pool", "Replay", "Used", "repack", "shown", "union"]

MODES = ("add", "substitute")
_TOLERANCE = 1e-4  # a fraction is taken to be given to four decimals


@dataclasses.dataclass(frozen=True)
class Replay:
    """How much of each batch comes from the earlier stages.

    The first stage has nothing to replay: there `add` adds no rows and `substitute` substitutes
    none, so one setting can stand in every stage of a run. The ledger shows what was replayed.

    Attributes:
        fraction: share of replayed rows in the whole batch, in (0, 1).
        mode: "add": the stage's batch_size counts the new rows, and replay rows come on top, so
            that a run with replay sees the same new rows at the same steps as one without (25%
            costs 1.33 times the compute). "substitute": batch_size counts all rows, and replay
            takes the place of new ones (equal compute, fewer new rows).
        buffer: which of the rows that were read may come again, and in what order.

    Example:
        >>> Replay(0.25).rows_per_step(12), Replay(0.25, "substitute").rows_per_step(12)
        ((12, 4), (9, 3))
    """

    fraction: float
    mode: str = "add"
    buffer: Buffer = Everything()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"replay mode {self.mode!r} is unknown; use {' or '.join(MODES)}")
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"replay fraction is {self.fraction}; give the share of the batch, between 0 and 1 "
                "(for no replay leave replay out)"
            )

    def settings(self) -> list[Any]:
        """Return everything that decides the replayed rows, as plain values to be hashed."""
        plain = [self.fraction, self.mode]
        return plain if self.buffer == Everything() else [*plain, self.buffer.settings()]

    def pool(
        self,
        plans: Sequence[Plan],
        history: Sequence[Used],
        num_domains: int,
        key: int,
        buffer_key: int | None = None,
        reading: Mapping[int, ReadFn] | None = None,
    ) -> Pool:
        """Build what a stage may replay, after the stages before it have read `history`.

        Args:
            plans: what `Used.plan` and the pool's `locate` refer to.
            history: what was read, stage after stage; at least one row.
            num_domains: D, width of `tokens_in_first`.
            key: names the order of replay in this stage.
            buffer_key: names what the buffer draws; the same in all stages, so that a reservoir
                carries on from one to the next. None: `key`.
            reading: stage -> function from k to (index into plans, use) of the k-th new row which
                it read, for the stages whose very rows are in `history`.

        Raises:
            ValueError: the buffer cannot be kept (see the buffers).
        """
        return self.buffer.pool(
            History(plans, history, num_domains, reading or {}),
            key,
            key if buffer_key is None else buffer_key,
        )

    def rows_per_step(self, batch_size: int) -> tuple[int, int]:
        """Return (new rows, replayed rows) of a step whose stage has `batch_size`.

        Raises:
            ValueError: the fraction is not a whole number of rows; names the nearest that are.
        """
        if self.mode == "add":
            exact = batch_size * self.fraction / (1 - self.fraction)
        else:
            exact = batch_size * self.fraction

        def share(num_replayed: int) -> float:
            return num_replayed / (batch_size + (num_replayed if self.mode == "add" else 0))

        most = batch_size - 1 if self.mode == "substitute" else round(exact) + 1
        nearest = round(exact)
        if 1 <= nearest <= most and abs(share(nearest) - self.fraction) <= _TOLERANCE:
            return (batch_size if self.mode == "add" else batch_size - nearest), nearest
        choices = sorted({n for n in (int(exact), int(exact) + 1) if 1 <= n <= most})
        mend = " or ".join(f"{share(n):.4f} ({n} rows)" for n in choices)
        raise ValueError(
            f"replay fraction {self.fraction} in mode {self.mode!r} with batch_size {batch_size} "
            f"is {exact:.4g} rows; use {mend + ', or ' if mend else ''}another batch_size"
        )


def shown(plan: Plan, first: int, count: int) -> Slices:
    """Return the slices that the uses first .. first + count - 1 of a plan have shown, once each.

    Example: of a plan of 3 rows, uses 2, 3, 4 are the last row of one epoch and two of the next;
    they need not be all three rows.
    """
    first, count = whole_epoch(first, count, plan.num_rows)
    use = first + np.arange(count)
    _, row = rows_at([plan], np.zeros(count, np.int64), use)
    return plan.layout.rows(np.unique(row))


def union(slices: Sequence[Slices]) -> Slices:
    """Merge slices that overlap or touch, so that every seen transition is there once.

        document 5   [0, 4)  [2, 6)  [6, 9)      [12, 15)
        union        [0,              9)         [12, 15)

    Args:
        slices: slices of one store, from any layouts.

    Returns:
        Slices sorted by document and start, apart from each other; `row` is 0.

    Example:
        >>> a = Slices(*[np.array(x) for x in ([0, 0], [5, 5], [0, 6], [4, 3])])
        >>> b = Slices(*[np.array(x) for x in ([0, 0], [5, 5], [2, 12], [4, 3])])
        >>> union([a, b]).start.tolist(), union([a, b]).length.tolist()
        ([0, 12], [9, 3])
    """
    document = np.concatenate([s.document for s in slices]).astype(np.int64)
    start = np.concatenate([s.start for s in slices]).astype(np.int64)
    end = start + np.concatenate([s.length for s in slices]).astype(np.int64)
    by_start = np.lexsort((start, document))
    document, start, end = document[by_start], start[by_start], end[by_start]
    # Lay the documents apart on one line; then a slice begins a new piece where it starts past all
    # ends before it.
    origin = document * (int(end.max(initial=0)) + 1)
    reach = np.maximum.accumulate(origin + end)
    fresh = np.concatenate([[True], (origin + start)[1:] > reach[:-1]])[: len(start)]
    last = np.append(np.flatnonzero(fresh)[1:] - 1, len(start) - 1)[: np.count_nonzero(fresh)]
    length = (reach - origin)[last] - start[fresh]
    return Slices(np.zeros(len(length), np.int64), document[fresh], start[fresh], length)


def repack(slices: Sequence[Slices], row_length: int, *, method: str, key: int | None) -> Layout:
    """Lay what earlier layouts have shown out again, in rows of another length.

    Args:
        slices: seen slices of one store, from any layouts.
        row_length: T of the new rows.
        method: a packing method.
        key: 128-bit key of the order of the pieces; None: by document.

    Returns:
        A Layout that holds every transition of the slices exactly once, and no other.
    """
    pieces = union(slices)
    order = None if key is None else shuffle_with_key(len(pieces.length), key)
    layout = pack(pieces.length, row_length, method=method, order_N=order)
    return dataclasses.replace(
        layout,
        document=pieces.document[layout.document],
        start=layout.start + pieces.start[layout.document],
    )
