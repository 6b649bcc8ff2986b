"""A loss whose gradients one can write down: for the methods that bend or deal out gradients.

Token number n stands for the vector VECTORS[n]. Weights w, parameters theta:

    Linear      loss = sum(w * VECTORS[n] . theta) / sum(w)             gradient: the mean vector
    Quadratic   loss = sum(w * |theta - VECTORS[n]|^2 / 2) / sum(w)     gradient: theta - the mean
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from lcl.data import Batch
from lcl.objectives import NextToken
from lcl.objectives.next_token import sum_by_source

VECTORS = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [0.5, 2.0], [-2.0, -1.0]], np.float32)


def batch(tokens, sources) -> Batch:
    """Rows of tokens with weight 1, token 0 being padding."""
    tokens = np.asarray(tokens, np.int32)
    real = (tokens > 0).astype(np.int32)
    sources = np.broadcast_to(np.asarray(sources, np.int32)[:, None], tokens.shape) * real
    return Batch(tokens, tokens, real, 0 * tokens, real.astype(np.float32), sources)


@dataclasses.dataclass(frozen=True)
class Linear(NextToken):
    """See above; `params` is {"theta": [2]}."""

    def losses(self, theta, vectors_BTD):
        """The loss of each token, [B, T]."""
        return vectors_BTD @ theta

    def __call__(self, model, params, batch, num_sources, denominator=None):
        del model
        losses_BT = self.losses(params["theta"], jnp.asarray(VECTORS)[batch.tokens])
        weights_BT = batch.loss_weights
        total = jnp.sum(weights_BT) if denominator is None else denominator
        aux = {
            "nll_sum_by_source": sum_by_source(
                weights_BT * losses_BT, batch.source_ids, num_sources
            ),
            "weight_by_source": sum_by_source(weights_BT, batch.source_ids, num_sources),
            "weight": jnp.sum(weights_BT),
        }
        return jnp.sum(weights_BT * losses_BT) / jnp.where(total > 0, total, 1.0), aux


@dataclasses.dataclass(frozen=True)
class Quadratic(Linear):
    """See above."""

    def losses(self, theta, vectors_BTD):
        """The loss of each token, [B, T]."""
        return jnp.sum((theta - vectors_BTD) ** 2, axis=-1) / 2
