"""Attention kernels behind one door, `attend`, and one structured mask."""

from __future__ import annotations

from lcl.attention.api import attend, check_attention
from lcl.attention.mask import Mask
from lcl.attention.rows import Relation, Rows
from lcl.attention.splash import BlockSizes

__all__ = ["BlockSizes", "Mask", "Relation", "Rows", "attend", "check_attention"]
