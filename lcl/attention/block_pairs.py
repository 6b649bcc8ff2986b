"""Which blocks of keys each block of queries has to visit, found from the tokens' own rows.

Legend: B batch, T query length, S key length, C queries a block, E keys a block, I blocks of
queries, J blocks of keys.

Every block knows the range of its original row indices and the range of its documents. Two blocks
whose ranges cannot meet are never visited; two blocks in which everything meets need no mask. So
the tokens may stand in any order, and an order in which blocks hold neighbours is fast.

    one row, zigzag over 2, blocks of 2         keys 0 1 | 6 7 | 2 3 | 4 5
                                     queries 0 1   /     .     .     .      . never visited
                                             6 7   #     /     #     #      # visited unmasked
                                             2 3   #     .     /     .      / visited with the mask
                                             4 5   #     .     #     /

The table is data: a traced int32 [B, I, J], so one compiled program serves every packing. It is the
only thing here that grows with T squared, by 4 bytes for every pair of blocks: 1 MiB a row at 64K
tokens in blocks of 128 (`default_block` keeps it below 16 MiB at 1M).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcl.attention.mask import Mask
from lcl.attention.rows import Rows

_MOST_BLOCKS = 2048


class BlockedRows(NamedTuple):
    """Row index and document of every token, cut into blocks: int32 [B, blocks, block]."""

    row_BJE: jax.Array
    segment_BJE: jax.Array | None


class Visits(NamedTuple):
    """For every block of one side, the blocks of the other that it meets.

    Attributes:
      order_BIJ: int32, block numbers: those that need no mask, then those that do, then the rest.
      num_full_BI: int32, how many need no mask.
      num_BI: int32, how many are visited.
    """

    order_BIJ: jax.Array
    num_full_BI: jax.Array
    num_BI: jax.Array


def default_block(length: int) -> int:
    """The block length for a row: 128, and more for rows of more than 256K tokens."""
    return max(128, 128 * -(-length // (128 * _MOST_BLOCKS)))


def block_rows(
    rows: Rows, batch: int, length: int, block: int, *, repeat_last: bool
) -> BlockedRows:
    """Cuts rows into blocks; the last one is filled up.

    Args:
      rows: of [batch, length] tokens.
      batch, length, block: their sizes.
      repeat_last: fill up with the last token's row and document (queries, whose results are
        dropped), or else with padding (keys, which must not be seen; needs segments).

    Returns:
      blocks, ceil(length / block) of them.
    """
    padding = -length % block
    row_BT = jnp.arange(length, dtype=jnp.int32) if rows.row_index_BT is None else rows.row_index_BT

    def cut(x_BT, mode):
        x_BT = jnp.broadcast_to(x_BT, (batch, length))
        if padding:
            x_BT = jnp.pad(x_BT, ((0, 0), (0, padding)), mode=mode)
        return x_BT.reshape(batch, -1, block)

    row_BJE = cut(row_BT, "edge")
    if rows.segment_ids_BT is None:
        assert repeat_last or not padding, "only a segment can hide padded keys"
        return BlockedRows(row_BJE, None)
    return BlockedRows(row_BJE, cut(rows.segment_ids_BT, "edge" if repeat_last else "constant"))


class _Ranges(NamedTuple):
    """Inclusive ranges over the real tokens of each block, and whether they are one document."""

    first_row: Any
    last_row: Any
    first_segment: Any = None
    last_segment: Any = None
    uniform: Any = None

    def along(self, axis: int) -> _Ranges:
        return _Ranges(*(None if x is None else jnp.expand_dims(x, axis) for x in self))


def _ranges(rows: BlockedRows) -> _Ranges:
    row, segment = rows
    if segment is None:
        return _Ranges(row.min(-1), row.max(-1))
    real, top = segment != 0, jnp.iinfo(jnp.int32).max
    return _Ranges(
        jnp.min(jnp.where(real, row, top), axis=-1),
        jnp.max(jnp.where(real, row, 0), axis=-1),
        jnp.min(jnp.where(real, segment, top), axis=-1),
        jnp.max(segment, axis=-1),
        jnp.min(segment, axis=-1) == jnp.max(segment, axis=-1),
    )


def block_pairs(mask: Mask, query: BlockedRows, key: BlockedRows) -> tuple[jax.Array, jax.Array]:
    """Which pairs of blocks may meet, and in which of them everything is seen.

    Returns:
      (some, all), bool [B, I, J]. `some` is never false where a pair is seen; it may be true where
      none is (ranges overlap, members do not). `all` is only true where every pair is seen.
    """
    q, k = _ranges(query).along(2), _ranges(key).along(1)
    rows = q.first_row, q.last_row, k.first_row, k.last_row
    some, every = mask.some_visible(*rows), mask.all_visible(*rows)
    if q.first_segment is not None and k.first_segment is not None:
        # A block of padding alone has the range (top, 0), which overlaps none.
        some = some & (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
        one_document = q.uniform & k.uniform & (q.first_segment == k.first_segment)
        every = every & one_document & some
    return some, every


def visits(some_BIJ: jax.Array, every_BIJ: jax.Array) -> Visits:
    """The list of blocks J to visit for each block I; transpose the arguments for the other way."""
    rank_BIJ = jnp.where(every_BIJ, 0, jnp.where(some_BIJ, 1, 2)).astype(jnp.int8)
    return Visits(
        jnp.argsort(rank_BIJ, axis=-1, stable=True).astype(jnp.int32),
        jnp.sum(every_BIJ, axis=-1, dtype=jnp.int32),
        jnp.sum(some_BIJ, axis=-1, dtype=jnp.int32),
    )


def seen(mask: Mask, query_row_C, key_row_E, query_segment_C=None, key_segment_E=None) -> jax.Array:
    """The mask inside of one pair of blocks, bool [C, E]."""
    seen_CE = mask.visible(query_row_C[:, None], key_row_E[None, :])
    if query_segment_C is not None:
        query, key = query_segment_C[:, None], key_segment_E[None, :]
        seen_CE = seen_CE & (query == key) & (query != 0)
    return seen_CE
