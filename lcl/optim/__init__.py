"""Optimizers: Optax chains and schedules, one file a method. See README.md in this folder."""

from lcl.optim.adamw import AdamW, decay_mask
from lcl.optim.optimizer import Optimizer
from lcl.optim.reptile import Reptile, reptile
from lcl.optim.schedule import Schedule
from lcl.optim.schedule_free import ScheduleFree
from lcl.optim.schedules import (
    constant,
    cosine,
    infinite,
    inverse_sqrt,
    repeated_cosine,
    wsd,
    wsd_s,
)

__all__ = [
    "AdamW",
    "Optimizer",
    "Reptile",
    "Schedule",
    "ScheduleFree",
    "constant",
    "cosine",
    "decay_mask",
    "infinite",
    "inverse_sqrt",
    "repeated_cosine",
    "reptile",
    "wsd",
    "wsd_s",
]

# What gin files may call beside the dataclasses.
CONFIGURABLES = (
    "constant",
    "cosine",
    "infinite",
    "inverse_sqrt",
    "repeated_cosine",
    "wsd",
    "wsd_s",
)
