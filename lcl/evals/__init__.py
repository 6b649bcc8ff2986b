"""Evaluation: held-out loss by domain, and the loss matrix with what is read off it."""

from __future__ import annotations

from lcl.evals.heldout import EvalBatches, HeldOut, evaluate, summarise
from lcl.evals.loss_matrix import LossMatrix

__all__ = ["EvalBatches", "HeldOut", "LossMatrix", "evaluate", "summarise"]
