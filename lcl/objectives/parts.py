"""New and replayed tokens apart: two losses and two gradients of one batch.

batch      new  new  new | replayed
weights     1    1    1  |   1           source id < D: new; else replayed
new part    1    1    1  |   0
replayed    0    0    0  |   1           same rows, same shapes: what changes is who counts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ValueAndGrad = Callable[..., tuple[tuple[jax.Array, dict[str, Any]], Any]]


def value_and_grad_of(objective: Any) -> ValueAndGrad:
    """(model, params, batch, num_sources) -> ((loss, sums), gradients) of any objective.

    One that knows a way of its own to its gradient is asked; any other is differentiated.

    Args:
      objective: see `lcl.step.Objective`.
    """
    own = getattr(objective, "value_and_grad", None)
    return own if own is not None else jax.value_and_grad(objective, argnums=1, has_aux=True)


def plain(objective: Any) -> Any:
    """The loss that a method has changed the gradient of, taken out of it; accumulation stays.

    >>> from lcl.objectives import AGem, NextToken
    >>> plain(AGem(objective=NextToken(z_loss=1e-4))) == NextToken(z_loss=1e-4)
    True
    """
    while getattr(objective, "changes_gradient", False):
        objective = objective.objective
    return objective


def new_part(batch: Any, num_sources: int) -> Any:
    """The batch in which only new tokens count: those of the domains themselves.

    Args:
      batch: a Batch, fields [B, T].
      num_sources: 2 D; source ids of replayed tokens are D and more.
    """
    counts = batch.source_ids < num_sources // 2
    return batch._replace(loss_weights=jnp.where(counts, batch.loss_weights, 0.0))


def replayed_part(batch: Any, num_sources: int) -> Any:
    """The batch in which only replayed tokens count; see `new_part`."""
    counts = batch.source_ids >= num_sources // 2
    return batch._replace(loss_weights=jnp.where(counts, batch.loss_weights, 0.0))


def both_gradients(
    objective: Any, model: Any, params: Any, batch: Any, num_sources: int
) -> tuple[tuple[jax.Array, dict[str, Any]], Any, Any]:
    """Loss and gradient of the new tokens, and of the replayed ones.

    Args:
      objective: a loss of which a token with weight 0 is no part (`NextToken`), or `Accumulate`.
      model, params, batch, num_sources: as for the objective.

    Returns:
      (loss, sums) of the whole batch as the objective gives them (the loss is the token-weighted
      mean of the two parts'), the gradient of the new tokens' loss, and that of the replayed
      tokens' loss, which is zero where there are none. Twice the compute of one gradient.
    """
    value_and_grad = value_and_grad_of(objective)
    new, replayed = (part(batch, num_sources) for part in (new_part, replayed_part))
    (loss, sums), gradient = value_and_grad(model, params, new, num_sources)
    (old_loss, old_sums), reference = value_and_grad(model, params, replayed, num_sources)
    total = jax.tree.map(jnp.add, sums, old_sums)
    weight = jnp.where(total["weight"] > 0.0, total["weight"], 1.0)
    mean = (loss * sums["weight"] + old_loss * old_sums["weight"]) / weight
    return (mean, total), gradient, reference


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees, float32 scalar.

    >>> float(dot({"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, -1.0])}))
    1.0
    """
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def cosine(a_dot_b: jax.Array, a_dot_a: jax.Array, b_dot_b: jax.Array) -> jax.Array:
    """The cosine from three inner products; NaN where one of the two is zero, and has no direction.

    >>> float(cosine(jnp.array(-2.0), jnp.array(4.0), jnp.array(1.0)))
    -1.0
    """
    return jnp.where(
        (a_dot_a > 0.0) & (b_dot_b > 0.0), a_dot_b / jnp.sqrt(a_dot_a * b_dot_b), jnp.nan
    )
