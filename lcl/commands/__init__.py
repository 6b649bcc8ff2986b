"""The commands of `lcl`, a file a group; see README.md in this folder. Only lcl.main uses them."""

from lcl.commands import data, pods, reports, scoring, training

__all__ = ["data", "pods", "reports", "scoring", "training"]
