"""Evaluation: held-out loss by domain, the loss matrix, the stability gap."""

from __future__ import annotations

from lcl.evals.branches import Branches, StageClock
from lcl.evals.heldout import EvalBatches, HeldOut, evaluate, summarise
from lcl.evals.loss_matrix import LossMatrix
from lcl.evals.samples import Samples
from lcl.evals.stability_gap import Gap, StabilityGap

__all__ = [
    "Branches",
    "EvalBatches",
    "Gap",
    "HeldOut",
    "LossMatrix",
    "Samples",
    "StabilityGap",
    "StageClock",
    "evaluate",
    "summarise",
]
