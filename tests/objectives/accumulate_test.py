"""Accumulation: the loss and the gradient of the whole batch, however unequal the pieces are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.data import Batch
from lcl.models import Decoder, DecoderConfig, init_params
from lcl.objectives import Accumulate, NextToken
from lcl.objectives.next_token import NORMALISATIONS

CONFIG = DecoderConfig(61, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=2, context_length=32)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def batch(rng: np.random.Generator) -> Batch:
    """Eight rows of 16: full, nearly empty, and one with no weight at all; several documents."""
    tokens, targets = rng.integers(0, 61, (2, 8, 16), dtype=np.int32)
    filled = np.array([16, 1, 7, 16, 0, 3, 16, 12])
    real = np.arange(16) < filled[:, None]
    segments = np.where(real, 1 + np.arange(16) // 5, 0).astype(np.int32)
    positions = (np.arange(16, dtype=np.int32) % 5) * real
    weights = (rng.uniform(0.1, 2.0, (8, 16)) * real).astype(np.float32)
    sources = rng.integers(0, 3, (8, 16), dtype=np.int32) * real
    return Batch(tokens, targets, segments, positions.astype(np.int32), weights, sources)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_pieces_sum_to_the_whole(params, normalisation):
    pieces = 4 if normalisation == "token" else 2
    objective = NextToken(z_loss=1e-3, normalisation=normalisation)
    rows, model = batch(np.random.default_rng(1)), Decoder(CONFIG)
    whole = jax.jit(lambda p: jax.value_and_grad(objective, 1, has_aux=True)(model, p, rows, 3))
    split = jax.jit(lambda p: Accumulate(pieces, objective).value_and_grad(model, p, rows, 3))
    ((loss, sums), gradients), ((want, want_sums), want_gradients) = split(params), whole(params)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    for name, value in want_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=2e-6, err_msg=name)
    for got, value in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, value, rtol=0, atol=2e-6 * float(jnp.abs(value).max()))
    # What it is not: the mean of the pieces' own means, which this batch tells apart.
    if normalisation == "token":
        one = jax.jit(lambda p, rows: objective(model, p, rows, 3)[0])
        means = [
            one(params, jax.tree.map(lambda x, i=i: x[i::pieces], rows)) for i in range(pieces)
        ]
        assert abs(float(np.mean(means)) - float(want)) > 1e-2


def test_activations_of_one_piece_are_alive_at_once(params):
    rows = jax.tree.map(lambda x: np.tile(x, (8, 1)), batch(np.random.default_rng(1)))
    model = Decoder(CONFIG)

    def temporary(pieces: int) -> int:
        objective = Accumulate(pieces, NextToken(chunk_size=16))
        step = jax.jit(lambda p, rows: objective.value_and_grad(model, p, rows, 3))
        return step.lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.4 * temporary(1)


def test_no_pieces_are_refused():
    with pytest.raises(ValueError, match="pieces=0 must be a whole number, 1 or more"):
        Accumulate(0)
