"""Which device holds which tokens of a row: permutations that balance causal attention.

A context mesh cuts a row into equal, contiguous pieces. Under causality the last piece of an
unpermuted row sees everything and the first almost nothing. The data side permutes each row (and
its targets, which were shifted before), the kernels follow the row index that travels with the
tokens. A row of 8 tokens over context=2, named by their original index:

    contiguous        zigzag            striped
    0 1 2 3|4 5 6 7   0 1 6 7|2 3 4 5   0 2 4 6|1 3 5 7

    zigzag    the row is cut into 2 * context chunks; device i holds chunks i and 2*context-1-i, an
              early and a late one: every device has the same work at every step of a ring.
              (llama3 and MaxText call it dual chunk swap.)
    striped   token t stands on device t % context: every step of a ring is nearly a triangle
              (Brandon et al. 2023, arXiv:2311.09431). Cheap windows, but a document's tokens, hence
              block skipping by document, are spread over all devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LAYOUTS = ("contiguous", "zigzag", "striped")


def check(layout: str, length: int, context: int) -> None:
    """Refuses what cannot be laid out.

    Args:
      layout: one of LAYOUTS.
      length: tokens in a row.
      context: devices that share a row.

    Raises:
      ValueError: an unknown layout, or a row that does not split; names the value and the mend.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: there is no such layout; use one of {LAYOUTS}")
    if context < 1:
        raise ValueError(f"context={context}: a row lies on at least 1 device; use 1 or more")
    if length % context:
        raise ValueError(
            f"context={context} does not divide a row of {length} tokens: use a context that does, "
            f"or rows of {_nearest(length, context)}"
        )
    if layout == "zigzag" and context > 1 and length % (2 * context):
        raise ValueError(
            f"layout='zigzag' cuts a row into 2 x context = {2 * context} equal chunks, and a row "
            f"of {length} tokens does not split so: use rows of {_nearest(length, 2 * context)}, "
            "or layout='striped'"
        )


def permutation(layout: str, length: int, context: int) -> np.ndarray:
    """The original index of the token at every place of a laid-out row.

    Args:
      layout: one of LAYOUTS.
      length: tokens in a row, a multiple of `context` (zigzag: of 2 * context).
      context: devices that share a row; device i holds places i * length / context onwards.

    Returns:
      int64 [length]; `row[permutation(...)]` is the row laid out.

    Raises:
      ValueError: as `check`.

    Example:
      >>> permutation("zigzag", 8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
      >>> permutation("striped", 8, 2).tolist()
      [0, 2, 4, 6, 1, 3, 5, 7]
    """
    check(layout, length, context)
    places = np.arange(length, dtype=np.int64)
    if layout == "striped":
        return places.reshape(-1, context).T.reshape(-1)
    if layout == "zigzag" and context > 1:
        chunks = places.reshape(2 * context, -1)
        early = np.arange(context)
        return chunks[np.stack([early, 2 * context - 1 - early], axis=1)].reshape(-1)
    return places


def inverse(layout: str, length: int, context: int) -> np.ndarray:
    """The place of every original index: undoes `permutation`.

    Returns:
      int64 [length]; `laid_out[inverse(...)]` is the row in its original order.

    Example:
      >>> inverse("zigzag", 8, 2).tolist()
      [0, 1, 4, 5, 6, 7, 2, 3]
    """
    return np.argsort(permutation(layout, length, context))


def row_index(layout: str, batch: int, length: int, context: int) -> np.ndarray:
    """The row index of every token of a laid-out batch: what a batch carries, and `attend` takes.

    Returns:
      int32 [batch, length].
    """
    order = permutation(layout, length, context).astype(np.int32)
    return np.broadcast_to(order, (batch, length)).copy()


def device_rows(layout: str, place: Any, local_length: int, context: int, device: Any) -> Any:
    """The original index of the token at `place` on `device`: `permutation` in closed form.

    Arithmetic only, so that a device can compute its own rows instead of being sent a table.

    Args:
      layout: one of LAYOUTS.
      place: int or int array, 0 .. local_length - 1.
      local_length: tokens of a row on one device.
      context: devices that share a row.
      device: int or int array, place along the context axis.

    Example:
      >>> device_rows("zigzag", np.arange(4), 4, 2, 0).tolist()
      [0, 1, 6, 7]
    """
    if layout == "striped":
        return place * context + device
    if layout == "zigzag" and context > 1:
        half = local_length // 2
        late = place >= half
        chunk = device + late * (2 * context - 1 - 2 * device)
        return chunk * half + place - late * half
    return device * local_length + place


def _nearest(length: int, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)
