"""Losses: pure functions of (model, params, batch)."""

from __future__ import annotations

from lcl.objectives.a_gem import AGem
from lcl.objectives.accumulate import Accumulate
from lcl.objectives.cross_entropy import chunked_cross_entropy
from lcl.objectives.next_token import NextToken
from lcl.objectives.within_batch_reptile import WithinBatchReptile

__all__ = ["AGem", "Accumulate", "NextToken", "WithinBatchReptile", "chunked_cross_entropy"]
