"""Attention kernels behind one door, `attend`, and one structured mask."""

from __future__ import annotations

from lcl.attention.api import attend
from lcl.attention.mask import Mask

__all__ = ["Mask", "attend"]
