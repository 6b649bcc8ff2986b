"""What ring, all_gather and ulysses attention are told before there are arrays."""

from __future__ import annotations

import dataclasses

from lcl.attention.mask import Mask
from lcl.attention.splash_blocks import BlockSizes


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """What is known, when compiling, of devices that share a row.

    Attributes:
      context: how many they are.
      mask: the rules; a ring of splash takes no prefix.
      layout: how rows are laid out over the devices; splash goes by it.
      inner: "blockwise" or "splash".
      scale, soft_cap, block_sizes, interpret: as for the inner attention.
      axis: the mesh axis that they stand along.
    """

    context: int
    mask: Mask
    layout: str = "contiguous"
    inner: str = "blockwise"
    scale: float | None = None
    soft_cap: float | None = None
    block_sizes: BlockSizes | None = None
    interpret: bool = False
    axis: str = "context"
