"""How the tokens on two devices of a ring stand to each other, for kernels that must know early.

Legend: T tokens of a row on one device, c devices that share a row.

A kernel whose mask is compiled in (splash) cannot look at row indices. But a layout leaves few
cases, and they depend on the pair (device of the queries, device of the keys) only:

    contiguous                              striped
    keys of an earlier device: all          keys of an earlier device: b <= a
    keys of a later device: nothing         keys of a later device:    b <  a

(b, a: places of key and query on their devices. Zigzag rows need no cases: see
`lcl.attention.ring`.)

A window adds a few more. So the kernel is compiled once a case, and each step of the ring looks up
its case in a table of c x c small integers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lcl.attention.mask import Mask
from lcl.attention.rows import Relation


class Cases(NamedTuple):
    """All cases of a ring.

    Attributes:
      own: a device's queries and its own keys.
      distinct: the cases that occur between different devices; None: nothing is seen.
      which: int32 [c, c], number of the case of (device of queries, device of keys) in `distinct`.
      num_steps: how far keys must travel; keys of a device further on are seen by nobody.
    """

    own: Relation
    distinct: tuple[Relation | None, ...]
    which: np.ndarray
    num_steps: int


def ring_cases(mask: Mask, layout: str, local_length: int, context: int) -> Cases:
    """The cases of a layout.

    Args:
      mask: causal and window; no prefix, no table.
      layout: contiguous or striped; see `lcl.attention.layouts`.
      local_length: T.
      context: c.

    Raises:
      ValueError: a mask that has no such cases; use blockwise attention inside the ring.
    """
    if mask.explicit is not None or (mask.prefix_length and mask.causal):
        raise ValueError(
            f"prefix_length={mask.prefix_length} has no static cases in a ring: use "
            "impl='all_gather'"
        )
    if context == 1:
        layout = "contiguous"
    if not mask.causal and mask.window is None:
        layout = "contiguous"  # everything is seen, in any order
    if layout == "zigzag":
        raise ValueError(
            f"window={mask.window}, causal={mask.causal} has no static cases over zigzag rows: use "
            "layout='contiguous' or 'striped'"
        )
    distinct: list[Relation | None] = []
    which = np.zeros((context, context), np.int32)
    num_steps = 0
    for queries in range(context):
        for keys in range(context):
            if queries == keys:
                continue
            case = _case(mask, layout, local_length, context, queries, keys)
            if case not in distinct:
                distinct.append(case)
            which[queries, keys] = distinct.index(case)
            if case is not None:
                num_steps = max(num_steps, (queries - keys) % context)
    own = _case(mask, layout, local_length, context, 0, 0)
    assert own is not None  # a token sees itself
    return Cases(own, tuple(distinct), which, num_steps)


def _case(
    mask: Mask, layout: str, local_length: int, context: int, queries: int, keys: int
) -> Relation | None:
    if not mask.causal and mask.window is None:
        return Relation(causal=False)
    if layout == "striped":
        return _striped(mask, local_length, context, queries - keys)
    return _contiguous(mask, local_length, (queries - keys) * local_length)


def _contiguous(mask: Mask, length: int, offset: int) -> Relation | None:
    """Query a and key b are a + offset - b rows apart, 0 <= a, b < length."""
    nearest, farthest = offset - (length - 1), offset + (length - 1)
    if mask.causal and farthest < 0:
        return None
    if mask.window is not None and (nearest >= mask.window or -farthest >= mask.window):
        return None
    after = not mask.causal or nearest >= 0
    within = mask.window is None or max(farthest, -nearest) < mask.window
    if after and within:
        return Relation(causal=False)
    return Relation(mask.causal, offset, None if within else mask.window)


def _striped(mask: Mask, length: int, context: int, ahead: int) -> Relation | None:
    """Query a and key b are (a - b) * c + ahead rows apart, |ahead| < c."""
    offset = 0 if ahead >= 0 or not mask.causal else -1
    if mask.window is None:
        return Relation(causal=True, offset=offset)
    if not mask.causal:
        raise ValueError(
            f"causal=False, window={mask.window} has no static cases over striped rows: use "
            "layout='contiguous'"
        )
    # a - b <= (window - 1 - ahead) // c, and a relation's window counts a + offset - b.
    window = (mask.window - 1 - ahead) // context + 1 + offset
    if window < 1:
        return None
    return Relation(causal=True, offset=offset, window=window if window < length else None)
