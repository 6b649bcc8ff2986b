"""The one structured mask: which key a query may see, decided from row indices and segments.

Legend: B batch, T query length, S key length.

Three index notions stay apart. *Row index*: the place of a token in its original row; causality,
windows and prefixes compare it. *Position*: what RoPE has already rotated by; the mask never looks
at it. *Segment*: the document of a token (0 = padding); equal segments see each other, and padding
sees nothing and is seen by nothing.

    tokens     a b c | d e | -          causal, document-masked;
    segments   1 1 1   2 2   0          x = query (down) sees key (across)
                                            a b c d e -
                                          a x . . . . .
                                          b x x . . . .
                                          c x x x . . .
                                          d . . . x . .
                                          e . . . x x .
                                          - . . . . . .
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

_PICTURE_ROWS = 8
_MAX_PICTURE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see; a conjunction of the rules that are set.

    Attributes:
      causal: a key is visible only from its own row index on.
      window: if set, only keys less than `window` rows away (1: the token itself).
      prefix_length: if set, the first `prefix_length` rows see each other whatever `causal` says
        (prefix language models); windows and segments still apply.
      explicit: if set, a square table of truth values indexed [query row, key row], for experiments
        at small sizes; anything `np.asarray` takes. Stored as nested tuples, so that a mask can be
        hashed (it is a static argument of compiled functions).

    Raises:
      ValueError: a window below 1, a negative prefix, a table that is not square.

    Example:
      >>> print(Mask(causal=True, window=2).picture(4))
      x . . .
      x x . .
      . x x .
      . . x x
      >>> print(Mask().picture(4, segment_ids=[1, 1, 2, 0]))
      x . . .
      x x . .
      . . x .
      . . . .
    """

    causal: bool = True
    window: int | None = None
    prefix_length: int | None = None
    explicit: Any = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window={self.window}: a window holds at least 1 key; None means no window"
            )
        if self.prefix_length is not None and self.prefix_length < 0:
            raise ValueError(
                f"prefix_length={self.prefix_length}: must be 0 or more; None means no prefix"
            )
        if self.explicit is not None:
            table = np.asarray(self.explicit, dtype=bool)
            if table.ndim != 2 or table.shape[0] != table.shape[1]:
                raise ValueError(f"explicit has shape {table.shape}: must be square, [rows, rows]")
            rows = tuple(tuple(bool(x) for x in row) for row in table)
            object.__setattr__(self, "explicit", rows)

    def visible(self, query_row: Any, key_row: Any) -> Any:
        """Whether a key is visible by the rules that look at row indices only.

        A function of coordinates, so that a kernel can ask it for any block without T x S existing.

        Args:
          query_row, key_row: int arrays (NumPy or JAX) that broadcast against each other.

        Returns:
          bool array of the broadcast shape.
        """
        seen = (query_row == query_row) & (key_row == key_row)
        if self.causal:
            below = key_row <= query_row
            if self.prefix_length:
                below = below | ((key_row < self.prefix_length) & (query_row < self.prefix_length))
            seen = seen & below
        if self.window is not None:
            distance = query_row - key_row
            seen = seen & (distance < self.window) & (-distance < self.window)
        if self.explicit is not None:
            table: Any = np.asarray(self.explicit)
            if not isinstance(query_row, np.ndarray) or not isinstance(key_row, np.ndarray):
                import jax.numpy as jnp

                table = jnp.asarray(table)
            seen = seen & table[query_row, key_row]
        return seen

    def some_visible(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> Any:
        """Whether a query of the rows first_query .. last_query may see a key of theirs.

        What lets a kernel skip whole blocks, in whatever order their tokens stand; `visible` still
        decides inside of them.

        Args:
          first_query, last_query, first_key, last_key: int arrays (NumPy or JAX) that broadcast,
            inclusive ranges of row indices.

        Returns:
          bool array; true wherever some pair is visible, and then perhaps where none is (an
          explicit table is not looked at).

        Example:
          >>> mask = Mask(window=100)
          >>> (
          ...     bool(mask.some_visible(256, 383, 128, 156)),
          ...     bool(mask.some_visible(256, 383, 128, 157)),
          ... )
          (False, True)
        """
        some = (first_query == first_query) & (first_key == first_key)
        if self.causal:
            below = first_key <= last_query
            if self.prefix_length:
                within = (first_key < self.prefix_length) & (first_query < self.prefix_length)
                below = below | within
            some = some & below
        if self.window is not None:
            some = some & (first_query - last_key < self.window)
            some = some & (first_key - last_query < self.window)
        return some

    def all_visible(self, first_query: Any, last_query: Any, first_key: Any, last_key: Any) -> Any:
        """Whether all those queries see all those keys: true only where they do.

        What lets a kernel leave out the mask; arguments as for `some_visible`.
        """
        every = (first_query == first_query) & (first_key == first_key)
        if self.explicit is not None:
            return every & False
        if self.causal:
            below = last_key <= first_query
            if self.prefix_length:
                within = (last_key < self.prefix_length) & (last_query < self.prefix_length)
                below = below | within
            every = every & below
        if self.window is not None:
            every = every & (last_query - first_key < self.window)
            every = every & (last_key - first_query < self.window)
        return every

    def dense(
        self,
        row_index: Any,
        segment_ids: Any = None,
        key_row_index: Any = None,
        key_segment_ids: Any = None,
    ) -> Any:
        """The whole mask, rules on rows and documents together.

        Args:
          row_index: int [..., T], original row index of each query (`np.arange(T)` if in order).
          segment_ids: int [..., T] or None; 0 is padding.
          key_row_index, key_segment_ids: int [..., S], the same of the keys; None: the queries'.

        Returns:
          bool [..., T, S], [query, key].
        """
        key_row_index = row_index if key_row_index is None else key_row_index
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        seen = self.visible(row_index[..., :, None], key_row_index[..., None, :])
        if segment_ids is not None:
            query, key = segment_ids[..., :, None], key_segment_ids[..., None, :]
            seen = seen & (query == key) & (query != 0)
        return seen

    def picture(self, num_rows: int, segment_ids: Any = None) -> str:
        """The mask of one row of `num_rows` tokens as text: x visible, . not; queries go down."""
        if num_rows > _MAX_PICTURE_ROWS:
            raise ValueError(
                f"num_rows={num_rows}: a picture holds at most {_MAX_PICTURE_ROWS} rows"
            )
        if segment_ids is not None:
            segment_ids = np.asarray(segment_ids)
        seen = self.dense(np.arange(num_rows), segment_ids)
        return "\n".join(" ".join("x" if x else "." for x in row) for row in seen)

    def __str__(self) -> str:
        """The rules that are set, and the picture of a short row."""
        num_rows = len(self.explicit) if self.explicit is not None else _PICTURE_ROWS
        rules = []
        for field in ("causal", "window", "prefix_length"):
            value = getattr(self, field)
            if value is not None:
                rules.append(f"{field}={value}")
        if self.explicit is not None:
            rules.append(f"explicit=[{num_rows}, {num_rows}]")
        head = f"Mask({', '.join(rules)})"
        if num_rows > _MAX_PICTURE_ROWS:
            return head
        return f"{head}\n{self.picture(num_rows)}"
