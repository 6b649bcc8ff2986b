"""What attention knows of tokens besides their vectors: rows and documents, and static relations.

Legend: B batch, T length.

The kernels decide what a query sees in one of two ways. `Rows` are data: they travel with the
tokens, so any permuted row is right. A `Relation` is known when compiling, for kernels that choose
their blocks then (Pallas); it compares places in the block at hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax


class Rows(NamedTuple):
    """Which row and which document each token of a block belongs to.

    Attributes:
      row_index_BT: int32 [B, T], place in the original row, which causality, windows and prefixes
        compare; None: 0 .. T-1, in order.
      segment_ids_BT: int32 [B, T], document, 0 = padding, which sees nothing and is seen by
        nothing; None: all one document.
    """

    row_index_BT: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Relation:
    """How two blocks of tokens stand to each other; query and key places count from 0 in each.

        offset=0, causal        offset=-1 (strictly before)   window=2

            key 0 1 2 3             key 0 1 2 3                key 0 1 2 3
        query 0 x . . .         query 0 . . . .            query 0 x . . .
              1 x x . .               1 x . . .                  1 x x . .
              2 x x x .               2 x x . .                  2 . x x .
              3 x x x x               3 x x x .                  3 . . x x

    Attributes:
      causal: the query at `a` sees the key at `b` only if b <= a + offset.
      offset: how much later the queries stand than their places say.
      window: if set, only if |a + offset - b| < window.

    Raises:
      ValueError: a window below 1.

    Example:
      >>> Relation(offset=-1).visible(2, 1), Relation(offset=-1).visible(2, 2)
      (True, False)
    """

    causal: bool = True
    offset: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window}: a window holds at least 1 key; None means no window"
            )

    def visible(self, query: Any, key: Any) -> Any:
        """Whether the query at place `query` sees the key at `key`; ints or arrays, broadcast."""
        distance = query + self.offset - key
        seen = distance == distance
        if self.causal:
            seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & (distance < self.window) & (-distance < self.window)
        return seen

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return not self.causal and self.window is None
