"""Attention kernels behind one door, `attend`, and one structured mask."""

from __future__ import annotations

from lcl.attention.api import attend
from lcl.attention.blocked import blocked
from lcl.attention.mask import Mask
from lcl.attention.reference import reference

__all__ = ["Mask", "attend", "blocked", "reference"]
