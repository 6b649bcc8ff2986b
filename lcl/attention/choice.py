"""Which attention can serve a call, and which one "auto" means.

Everything here is decided from shapes and settings, so that a run asks the same questions when its
config is built (`check_attention`) as `attend` does when it is traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lcl.attention import layouts
from lcl.attention.mask import Mask
from lcl.attention.splash import BlockSizes, splash_obstacle

IMPLEMENTATIONS = (
    "auto",
    "reference",
    "blockwise",
    "splash",
    "ring",
    "all_gather",
    "ulysses",
)
ACROSS_DEVICES = ("ring", "all_gather", "ulysses")
# "auto" does not make a table of scores that would fill a chip: 2 ** 26 float32 are 256 MB a head.
_MAX_AUTO_SCORES = 2**26


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call of `attend` before there are arrays.

    Attributes:
      mask: the rules.
      row_length: tokens of a whole row.
      num_heads, num_kv_heads: of the whole call.
      layout: how rows are laid out over the context axis.
      context, tensor, batch_parts: devices that share a row, the heads, the batch.
      batch: rows; None: not known yet.
      dtype: of q.
      platform: "cpu", "tpu" or "gpu".
      block_sizes: of splash.
      interpret: splash may be interpreted.
      own_rows: whether a row index is given.
      external_keys: whether keys are other tokens than queries.
    """

    mask: Mask
    row_length: int
    num_heads: int
    num_kv_heads: int
    layout: str = "contiguous"
    context: int = 1
    tensor: int = 1
    batch_parts: int = 1
    batch: int | None = None
    dtype: Any = "float32"
    platform: str = "cpu"
    block_sizes: BlockSizes | None = None
    interpret: bool = False
    own_rows: bool = False
    external_keys: bool = False

    @property
    def inner(self) -> str:
        """What attends on each device under ring, all_gather and ulysses."""
        return "splash" if self.platform == "tpu" or self.interpret else "blockwise"

    @property
    def local_heads(self) -> tuple[int, int]:
        """Query and key heads on one device; too few key heads are repeated, one a query head."""
        num_heads = self.num_heads // self.tensor
        if self.num_kv_heads % self.tensor:
            return num_heads, num_heads
        return num_heads, self.num_kv_heads // self.tensor


def choose(impl: str, call: Call) -> str:
    """The implementation that serves a call: `impl` itself, or what "auto" stands for.

    "auto": ring where a context axis splits the rows; else splash on TPU; else blockwise; and dense
    attention for what none of them takes (explicit masks, float64), on short rows.

    Raises:
      ValueError: `impl` is unknown or cannot serve the call; says why, and what to change.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: there is no such attention; use one of {IMPLEMENTATIONS}")
    if impl != "auto":
        if obstacle := find_obstacle(impl, call):
            raise ValueError(f'attention "{impl}" cannot run: {obstacle}')
        return impl
    if call.context > 1:
        candidates = ["ring"]
    else:
        candidates = ["splash", "blockwise"] if call.platform == "tpu" else ["blockwise"]
    for candidate in candidates:
        obstacle = find_obstacle(candidate, call)
        if not obstacle:
            return candidate
    # On TPU dense attention is only for what has no kernel at all: a layout or a window that one
    # cannot take is better changed.
    dense = call.platform != "tpu" or call.mask.explicit is not None or call.external_keys
    if dense and call.row_length**2 <= _MAX_AUTO_SCORES:
        return "reference"
    raise ValueError(
        f'attention "auto" takes "{candidate}" for rows of {call.row_length} tokens, which cannot '
        f"run: {obstacle}"
    )


def check_attention(
    impl: str,
    *,
    mask: Mask,
    layout: str,
    row_length: int,
    context: int,
    tensor: int,
    num_heads: int,
    num_kv_heads: int,
    block_sizes: BlockSizes | None = None,
    platform: str = "cpu",
    dtype: Any = "float32",
) -> None:
    """Refuses, when a config is built, what `attend` would refuse at the first step.

    Args:
      impl: one of IMPLEMENTATIONS.
      mask, layout, block_sizes: as for `attend`.
      row_length: tokens of a row.
      context, tensor: devices along these axes of the mesh.
      num_heads, num_kv_heads: of the model.
      platform: "cpu", "tpu" or "gpu".
      dtype: q's.

    Raises:
      ValueError: one line that names the value and the mend.

    Example:
      >>> heads = dict(num_heads=4, num_kv_heads=4, tensor=1)
      >>> check_attention("ring", mask=Mask(), layout="zigzag", row_length=64, context=8, **heads)
      >>> try:
      ...     check_attention(
      ...         "ulysses", mask=Mask(), layout="zigzag", row_length=64, context=8, **heads
      ...     )
      ... except ValueError as error:
      ...     print(str(error)[:60])
      attention "ulysses" cannot run: 4 heads on a device do not s
    """
    layouts.check(layout, row_length, context)
    call = Call(
        mask=mask,
        row_length=row_length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        layout=layout,
        context=context,
        tensor=tensor,
        dtype=dtype,
        platform=platform,
        block_sizes=block_sizes,
        own_rows=context > 1 and layout != "contiguous",
    )
    choose(impl, call)


def find_obstacle(impl: str, call: Call) -> str | None:
    """Why `impl` cannot serve a call, in one line with the mend, or None if it can."""
    if impl == "reference":
        return None
    if obstacle := _shared_obstacle(call):
        return obstacle
    if impl == "blockwise":
        return None
    if call.external_keys:
        return "keys come from elsewhere: use impl='blockwise' or 'reference'"
    if impl == "splash":
        return _splash_obstacle(call)
    return _across_obstacle(impl, call)


def _shared_obstacle(call: Call) -> str | None:
    if call.mask.explicit is not None:
        return "it takes no explicit mask: use impl='reference'"
    if np.dtype(call.dtype).name not in ("float32", "bfloat16"):
        return f"it computes in float32, and q is {call.dtype}: use impl='reference'"
    if call.batch is not None and call.batch % call.batch_parts:
        return (
            f"a batch of {call.batch} rows does not split over data x fsdp = {call.batch_parts} "
            "devices: use a batch that does"
        )
    if call.num_heads % call.tensor:
        return (
            f"{call.num_heads} heads do not split over tensor={call.tensor}: use a tensor axis "
            "that divides the heads"
        )
    return None


def _permuted(call: Call) -> bool:
    return call.layout != "contiguous" and call.context > 1


def _splash_obstacle(call: Call) -> str | None:
    if call.platform != "tpu" and not call.interpret:
        return f"it is a TPU kernel, and this is a {call.platform}: use impl='blockwise'"
    if call.context > 1:
        return (
            f"the mesh splits rows over context={call.context}: use impl='ring', 'all_gather' or "
            "'ulysses', which run splash inside"
        )
    if call.own_rows:
        return "it takes rows in their original order, and row_index is given: use impl='blockwise'"
    num_heads, num_kv_heads = call.local_heads
    return splash_obstacle(
        call.mask,
        query_length=call.row_length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=call.dtype,
        block_sizes=call.block_sizes,
    )


def _across_obstacle(impl: str, call: Call) -> str | None:
    try:
        layouts.check(call.layout, call.row_length, call.context)
    except ValueError as error:
        return str(error)
    num_heads, num_kv_heads = call.local_heads
    if impl == "ulysses" and num_heads % call.context:
        return (
            f"{num_heads} heads on a device do not split over context={call.context}: use a "
            "context that divides them, or impl='ring'"
        )
    if call.inner == "blockwise":
        return None
    if call.own_rows and not _permuted(call):
        return (
            "row_index is given, and the TPU kernel inside goes by the layout alone, which is "
            f"{call.layout!r}: name the layout that the rows follow, or leave row_index out"
        )
    if impl == "ring" and call.layout == "striped" and call.mask.window and not call.mask.causal:
        return (
            f"causal=False, window={call.mask.window} in a ring over striped rows on TPU: use "
            "layout='contiguous', or impl='all_gather'"
        )
    local = call.row_length // call.context
    if impl == "ulysses":
        num_heads //= call.context
        num_kv_heads = max(1, num_kv_heads // call.context)
    return splash_obstacle(
        call.mask,
        query_length=call.row_length if impl == "ulysses" else local,
        key_length=local if impl == "ring" else call.row_length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=call.dtype,
        block_sizes=call.block_sizes,
        layout=call.layout if call.context > 1 else "contiguous",
        ring=impl == "ring",
    )
