"""Saving, restoring and describing a run's state."""

from __future__ import annotations

from lcl.checkpoints.checkpointer import Checkpointer, Restored
from lcl.checkpoints.digest import state_digest
from lcl.checkpoints.errors import CheckpointError
from lcl.checkpoints.policy import CheckpointPolicy

__all__ = ["CheckpointError", "CheckpointPolicy", "Checkpointer", "Restored", "state_digest"]
