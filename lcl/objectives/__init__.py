"""Losses: pure functions of (model, params, batch)."""

from __future__ import annotations

from lcl.objectives.accumulate import Accumulate
from lcl.objectives.cross_entropy import chunked_cross_entropy
from lcl.objectives.next_token import NextToken

__all__ = ["Accumulate", "NextToken", "chunked_cross_entropy"]
