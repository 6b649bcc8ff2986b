"""Which blocks a Pallas kernel visits, worked out on the host from a rule, and their cost.

Legend: C shards of the query rows, Q query blocks of a shard, K key blocks, W widest row (or
column) of visible blocks.

    visible blocks      forward, dq: each row's blocks       dkv: each column's blocks pushed
    (causal, window)    pushed left, W of them               down, W of them
        # . . .             0 .          the grid has            . . . .
        # # . .             0 1          Q x W steps,            0 1 2 3   (. repeats the
        . # # .             1 2          not Q x K               1 2 3 .    next block: nothing
        . . # #             2 3                                             is fetched, or run)

The JAX library finds these by evaluating the mask at every element, which takes minutes for rows of
100 thousand tokens. A rule on row indices needs only the ends of each block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from lcl.attention.mask import Mask
from lcl.attention.rows import Relation


@dataclasses.dataclass(frozen=True)
class Rule:
    """A `Mask` or `Relation` in the form that a Pallas kernel evaluates inside of a block.

    Equal rules are equal and hash alike, so that a compiled kernel is found again.
    """

    causal: bool = True
    offset: int = 0
    window: int | None = None
    prefix_length: int = 0

    @classmethod
    def of(cls, mask: Mask | Relation) -> Rule:
        """The rule of a mask without a table, or of a relation."""
        if isinstance(mask, Relation):
            return cls(mask.causal, mask.offset, mask.window)
        assert mask.explicit is None
        prefix = mask.prefix_length or 0 if mask.causal else 0
        return cls(mask.causal, 0, mask.window, prefix)

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return not self.causal and self.window is None

    def __call__(self, query: Any, key: Any) -> Any:
        """Whether `key` is visible to `query`: int arrays of one shape, in a kernel."""
        assert not self.full
        if self.offset:
            query = query + self.offset
        terms = []
        if self.causal:
            below = key <= query
            if self.prefix_length:
                below = below | ((key < self.prefix_length) & (query < self.prefix_length))
            terms.append(below)
        if self.window is not None:
            terms.append(query - key < self.window)
            if not self.causal or self.prefix_length:
                terms.append(key - query < self.window)
        return functools.reduce(lambda a, b: a & b, terms)

    def blocks(self, first_query, last_query, first_key, last_key) -> np.ndarray:
        """Whether any query of a block may see any key of another; never False where one does.

        Args:
          first_query, last_query, first_key, last_key: int arrays that broadcast, the least and
            greatest row index of each block.

        Returns:
          bool of the broadcast shape.
        """
        first_query, last_query = first_query + self.offset, last_query + self.offset
        seen = np.ones(np.broadcast_shapes(np.shape(first_query), np.shape(first_key)), bool)
        if self.causal:
            below = first_key <= last_query
            if self.prefix_length:
                below |= (first_key < self.prefix_length) & (first_query < self.prefix_length)
            seen &= below
        if self.window is not None:
            seen &= first_query - last_key < self.window
            seen &= first_key - last_query < self.window
        return seen


class QueryRows:
    """Row indices of the queries, int32 [C, rows], hashable: part of a cache's key."""

    def __init__(self, rows: np.ndarray) -> None:
        self.array = np.ascontiguousarray(rows, dtype=np.int32)
        self._key = (self.array.shape, self.array.tobytes())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QueryRows) and self._key == other._key


class Table(NamedTuple):
    """What a kernel prefetches, one for each shard of the query rows.

    Attributes:
      block: the block to fetch at each step of the grid: int8 or int16 [C, 1, Q, W] key blocks, or
        [C, 1, W, K] query blocks for dkv.
      run: int8 of the same shape, 1 where there is something to compute.
    """

    block: np.ndarray
    run: np.ndarray


@functools.lru_cache(maxsize=64)
def visible_blocks(
    rule: Rule, rows: QueryRows, num_keys: int, query_block: int, key_block: int
) -> np.ndarray:
    """bool [C, Q, K]: the blocks in which a query may see a key.

    Args:
      rule: what sees what.
      rows: row indices of the queries of each shard.
      num_keys: keys there are, in order, a multiple of `key_block`.
      query_block, key_block: block sizes; `query_block` divides a shard's rows.
    """
    blocks_CQ = rows.array.reshape(rows.array.shape[0], -1, query_block)
    keys_K = np.arange(0, num_keys, key_block)
    return rule.blocks(
        blocks_CQ.min(axis=2)[:, :, None],
        blocks_CQ.max(axis=2)[:, :, None],
        keys_K,
        keys_K + key_block - 1,
    )


@functools.lru_cache(maxsize=64)
def forward_table(
    rule: Rule, rows: QueryRows, num_keys: int, query_block: int, key_block: int
) -> Table:
    """The key blocks that each query block visits, for the forward and the dq kernel."""
    seen_CQK = visible_blocks(rule, rows, num_keys, query_block, key_block)
    width = _width(seen_CQK)
    return _table([_pack_rows(seen_QK, width) for seen_QK in seen_CQK])


@functools.lru_cache(maxsize=64)
def backward_table(
    rule: Rule, rows: QueryRows, num_keys: int, query_block: int, key_block: int, in_place: bool
) -> Table:
    """The query blocks that each key block visits, for the dkv kernel.

    `in_place`: step w of a column is query block w, as the fused kernel needs, which also writes dq
    there; nothing is pushed together.
    """
    seen_CQK = visible_blocks(rule, rows, num_keys, query_block, key_block)
    columns_CKQ = seen_CQK.swapaxes(1, 2)
    if in_place:
        packed = [_in_place(seen_KQ) for seen_KQ in columns_CKQ]
    else:
        width = _width(columns_CKQ)
        packed = [_pack_columns(seen_KQ, width) for seen_KQ in columns_CKQ]
    return _table([(block.T, run.T) for block, run in packed])


def _width(seen: np.ndarray) -> int:
    return max(1, int(seen.sum(axis=2).max()))


def _pack_rows(seen_QK: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's visible columns pushed left; the rest names the next row's first: it is next."""
    order = np.argsort(~seen_QK, axis=1, kind="stable")[:, :width]
    run = np.arange(width) < seen_QK.sum(axis=1)[:, None]
    upcoming = 0
    first = np.zeros(len(order), np.int64)
    for row in reversed(range(len(order))):
        first[row] = upcoming
        upcoming = order[row, 0] if run[row, 0] else upcoming
    return np.where(run, order, first[:, None]), run


def _pack_columns(seen_KQ: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Each column's visible rows pushed to its end; what stands before names its first."""
    block, run = _pack_rows(seen_KQ[:, ::-1], width)
    block, run = seen_KQ.shape[1] - 1 - block[:, ::-1], run[:, ::-1]
    first = np.where(run.any(axis=1), block[np.arange(len(block)), np.argmax(run, axis=1)], 0)
    return np.where(run, block, first[:, None]), run


def _in_place(seen_KQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every query block at its own place; a skipped one names the next that runs, or the last."""
    places = np.arange(seen_KQ.shape[1])
    ahead = np.where(seen_KQ, places, len(places))
    block = np.minimum.accumulate(ahead[:, ::-1], axis=1)[:, ::-1]
    last = np.where(seen_KQ, places, 0).max(axis=1, keepdims=True)
    return np.where(block == len(places), last, block), seen_KQ


def _table(shards: list[tuple[np.ndarray, np.ndarray]]) -> Table:
    block = np.stack([block for block, _ in shards])[:, None]
    run = np.stack([run for _, run in shards])[:, None]
    # Scalar memory is small: as JAX does, the smallest type that holds the numbers.
    small = np.int8 if block.max() <= np.iinfo(np.int8).max else np.int16
    return Table(block.astype(small), run.astype(np.int8))
