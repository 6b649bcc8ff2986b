"""The next-token objective by hand-computed examples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.objectives import NextToken
from lcl.objectives.next_token import NORMALISATIONS, loss_shares, sum_by_source


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

    config = SimpleNamespace(dtype="float32", gradient_dtype="float32")

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


def documents(segment_ids, weights=None, seed=0):
    """A batch of random tokens with given documents, and weight 1 on every real cell."""
    rng = np.random.default_rng(seed)
    segment_ids = np.array(segment_ids, np.int32)
    tokens, targets = rng.integers(0, 3, (2, *segment_ids.shape)).astype(np.int32)
    weights = segment_ids > 0 if weights is None else np.array(weights)
    return FakeBatch(
        *(jnp.array(x) for x in (tokens, targets, segment_ids, np.zeros_like(tokens))),
        jnp.array(weights, jnp.float32),
        jnp.array(segment_ids % 2),
    )


def naive_loss(batch, normalisation):
    """Group by group, in float64, from the definition."""
    log_p = np.asarray(jax.nn.log_softmax(TABLE), np.float64)
    nll = -log_p[np.asarray(batch.tokens), np.asarray(batch.targets)]
    weights = np.asarray(batch.loss_weights, np.float64)
    rows, _ = np.indices(nll.shape)
    group = {
        "token": np.zeros_like(rows),
        "sequence": rows * 1000 + np.asarray(batch.segment_ids),
        "row": rows,
    }[normalisation]
    means = [
        (weights * nll)[group == g].sum() / weights[group == g].sum()
        for g in np.unique(group)
        if weights[group == g].sum() > 0
    ]
    return np.mean(means)


def loss_and_gradient(normalisation, batch):
    objective = NextToken(normalisation=normalisation)
    return jax.value_and_grad(lambda p: objective(FakeModel(), p, batch, 2), has_aux=True)(
        {"table": TABLE}
    )


def test_the_documented_example():
    """|a bbb| |cccc| with losses 8, 4 and 2: 3.5 by token, 4.67 by document, 3.5 by row."""
    segment_ids, weights = jnp.array([[1, 2, 2, 2], [1, 1, 1, 1]]), jnp.ones((2, 4))
    nll = np.array([[8, 4, 4, 4], [2, 2, 2, 2]])
    for normalisation, want in (("token", 3.5), ("sequence", 14 / 3), ("row", 3.5)):
        share, total = loss_shares(segment_ids, weights, normalisation)
        np.testing.assert_allclose((share * nll).sum() / total, want, rtol=1e-6)


def test_normalisations_agree_on_documents_of_one_length():
    equal = documents([[1, 1, 2, 2], [1, 1, 2, 2]])
    (want, _), want_gradient = loss_and_gradient("token", equal)
    for normalisation in ("sequence", "row"):
        (loss, _), gradient = loss_and_gradient(normalisation, equal)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_allclose(gradient["table"], want_gradient["table"], atol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [
        documents([[1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]),
        documents([[2, 1, 2, 0, 1, 2, 3]]),  # a row that a mesh has permuted
        documents([[1, 1, 2, 2]], [[0.5, 2.0, 0.0, 0.0]]),  # weights; a document without any
    ],
    ids=["unequal", "permuted", "weighted"],
)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_normalisations_are_as_defined(batch, normalisation):
    (loss, aux), _ = loss_and_gradient(normalisation, batch)
    np.testing.assert_allclose(loss, naive_loss(batch, normalisation), rtol=1e-6)
    # What the metrics are made of does not depend on it.
    (_, token_aux), _ = loss_and_gradient("token", batch)
    for name in aux:
        np.testing.assert_array_equal(aux[name], token_aux[name])
    assert aux["weight"] == np.asarray(batch.loss_weights).sum()


def test_the_gradient_is_that_of_the_normalised_loss():
    """A long document's gradient is scaled down: against jax.grad of the plain definition."""
    batch = documents([[1, 2, 2, 2, 2, 2, 0]], seed=3)

    def plain(params, share):
        log_p = jax.nn.log_softmax(params["table"])
        return -(log_p[batch.tokens, batch.targets] * share).sum()

    share = np.array([[1, 0.2, 0.2, 0.2, 0.2, 0.2, 0]]) / 2
    want = jax.grad(plain)({"table": TABLE}, share)["table"]
    (_, _), gradient = loss_and_gradient("sequence", batch)
    np.testing.assert_allclose(gradient["table"], want, atol=1e-6)
    (_, _), by_token = loss_and_gradient("token", batch)
    assert np.abs(by_token["table"] - want).max() > 0.01


MESHES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lcl.objectives.next_token import NORMALISATIONS
from tests.objectives.next_token_test import documents, loss_and_gradient

rng = np.random.default_rng(0)
segment_ids = np.sort(rng.integers(1, 6, (8, 16)), axis=1)
segment_ids[:, 12:] *= rng.integers(0, 2, (8, 1))  # some rows have padding
segment_ids[5] = 0
batch = documents(segment_ids)
names = ("data", "fsdp", "context", "tensor")
for normalisation in NORMALISATIONS:
    (want, _), want_gradient = loss_and_gradient(normalisation, batch)
    for sizes in ((8, 1, 1, 1), (2, 2, 2, 1)):
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
            spread = jax.tree.map(lambda x: jax.device_put(x, rows), batch)
            step = jax.jit(lambda b: loss_and_gradient(normalisation, b))
            (loss, _), gradient = step(spread)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_allclose(
            gradient["table"], want_gradient["table"], rtol=0, atol=1e-6
        )
    print(normalisation, "agrees")
"""


def test_eight_devices_give_the_loss_of_one(run_python):
    assert run_python(MESHES, devices=8).count("agrees") == 3


def test_sum_by_source_equals_bincount():
    rng = np.random.default_rng(0)
    values = rng.random((5, 40)).astype(np.float32)
    ids = rng.integers(0, 6, (5, 40))
    want = np.bincount(ids.ravel(), values.ravel(), minlength=7)
    np.testing.assert_allclose(sum_by_source(jnp.array(values), jnp.array(ids), 7), want, rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [{"z_loss": -1.0}, {"z_loss": float("nan")}, {"chunk_size": 0}, {"normalisation": "tokens"}],
)
def test_bad_values_are_errors(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        NextToken(**kwargs)
