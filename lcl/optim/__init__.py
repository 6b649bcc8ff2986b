"""Optimizers: Optax chains and schedules, one file a method. See README.md in this folder."""

from lcl.optim.adamw import AdamW, carry_over, decay_mask
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
    "carry_over",
    "constant",
    "cosine",
    "decay_mask",
    "infinite",
    "inverse_sqrt",
    "repeated_cosine",
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
