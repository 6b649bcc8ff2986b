"""The next-token objective by hand-computed examples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.objectives import NextToken
from lcl.objectives.next_token import sum_by_source


class FakeBatch(NamedTuple):
    tokens: jax.Array
    targets: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    loss_weights: jax.Array
    source_ids: jax.Array
    row_index: jax.Array | None = None


class FakeModel:
    """Logits of each token are a row of a table: hidden is one-hot, the head is the table."""

    config = SimpleNamespace(dtype="float32")

    def apply(
        self, variables, tokens, positions, segment_ids_BT=None, row_index_BT=None, *, method
    ):
        assert method == "hidden"
        assert positions.shape == segment_ids_BT.shape == tokens.shape
        return jax.nn.one_hot(tokens, 3)

    def head_kernel(self, params):
        return params["table"]


def batch(weights):
    ints = lambda rows: jnp.array(rows, jnp.int32)  # noqa: E731
    return FakeBatch(
        tokens=ints([[0, 1, 2], [1, 0, 0]]),
        targets=ints([[1, 2, 0], [0, 1, 0]]),
        segment_ids=ints([[1, 1, 1], [1, 1, 0]]),
        positions=ints([[0, 1, 2], [0, 1, 0]]),
        loss_weights=jnp.array(weights, jnp.float32),
        source_ids=ints([[0, 0, 0], [2, 2, 0]]),
    )


# Token 0 gives its target 1 the odds 2 : 1 : 1 (probability of token 1 is 1/4, ...).
TABLE = jnp.log(jnp.array([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0], [1.0, 1.0, 1.0]]))


def test_the_loss_is_the_global_token_average():
    weights = [[1.0, 1.0, 0.5], [2.0, 1.0, 0.0]]
    # nll: row 0: log 4, log 8/6, log 3; row 1: log 8, log 4, (padding)
    row0 = np.log(4) + np.log(8 / 6) + 0.5 * np.log(3)
    row1 = 2 * np.log(8) + np.log(4)
    loss, aux = NextToken(chunk_size=2)(FakeModel(), {"table": TABLE}, batch(weights), 4)
    np.testing.assert_allclose(loss, (row0 + row1) / 5.5, rtol=1e-6)
    np.testing.assert_allclose(aux["nll_sum_by_source"], [row0, 0, row1, 0], rtol=1e-6)
    np.testing.assert_allclose(aux["weight_by_source"], [2.5, 0, 3, 0])
    assert aux["weight"] == 5.5
    # A mean of the rows' means would be another number.
    assert abs(loss - (row0 / 2.5 + row1 / 3) / 2) > 0.03


def test_z_loss_is_in_the_loss_and_not_in_the_sums():
    weights = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    loss, aux = NextToken(z_loss=0.1)(FakeModel(), {"table": TABLE}, batch(weights), 1)
    np.testing.assert_allclose(loss, np.log(4) + 0.1 * np.log(4) ** 2, rtol=1e-6)
    np.testing.assert_allclose(aux["nll_sum_by_source"], [np.log(4)], rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot():
    weights = [[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]  # twice token 0 with target 1

    def loss(params):
        return NextToken()(FakeModel(), params, batch(weights), 4)

    gradient, aux = jax.grad(loss, has_aux=True)({"table": TABLE})
    want = np.zeros((3, 3))
    want[0] = [0.5, 0.25 - 1, 0.25]
    np.testing.assert_allclose(gradient["table"], want, atol=1e-6)
    assert set(aux) == {"nll_sum_by_source", "weight_by_source", "weight"}


def test_a_batch_without_weight_has_loss_and_gradient_zero():
    def loss(params):
        return NextToken()(FakeModel(), params, batch(np.zeros((2, 3))), 4)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)({"table": TABLE})
    assert value == 0.0
    assert aux["weight"] == 0.0
    assert not gradient["table"].any()


def test_sum_by_source_equals_bincount():
    rng = np.random.default_rng(0)
    values = rng.random((5, 40)).astype(np.float32)
    ids = rng.integers(0, 6, (5, 40))
    want = np.bincount(ids.ravel(), values.ravel(), minlength=7)
    np.testing.assert_allclose(sum_by_source(jnp.array(values), jnp.array(ids), 7), want, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"z_loss": -1.0}, {"z_loss": float("nan")}, {"chunk_size": 0}])
def test_bad_values_are_errors(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        NextToken(**kwargs)
