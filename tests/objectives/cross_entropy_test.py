"""Chunked cross-entropy against a plain log-softmax, and the arrays it must not make."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.objectives import chunked_cross_entropy

B, T, D, V = 2, 37, 16, 50


def inputs(batch=B, length=T, dim=D, vocab=V, seed=0):
    """hidden, kernel, targets, weights; some weights are 0, some are not 1."""
    keys = jax.random.split(jax.random.key(seed), 4)
    weights = jax.random.uniform(keys[3], (batch, length))
    return (
        jax.random.normal(keys[0], (batch, length, dim)),
        jax.random.normal(keys[1], (dim, vocab)) * 0.5,
        jax.random.randint(keys[2], (batch, length), 0, vocab),
        jnp.where(weights < 0.3, 0.0, weights),
    )


def plain(hidden, kernel, weights, targets, z_loss):
    logits = hidden @ kernel
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * jax.nn.logsumexp(logits, -1) ** 2)), nll


def value_and_gradients(f, hidden, kernel, targets, weights):
    """(sum, nll), (d hidden, d kernel, d weights) of 1.5 times the sum."""

    def scaled(hidden, kernel, weights):
        total, nll = f(hidden, kernel, weights)
        return 1.5 * total, nll

    return jax.value_and_grad(scaled, (0, 1, 2), has_aux=True)(hidden, kernel, weights)


def ours(hidden, kernel, targets, weights, **kwargs):
    def f(hidden, kernel, weights):
        return chunked_cross_entropy(hidden, kernel, targets, weights, **kwargs)

    return jax.jit(partial(value_and_gradients, f))(hidden, kernel, targets, weights)


def exact(hidden, kernel, targets, weights, z_loss=0.0):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden, kernel, weights)]
        f = partial(plain, targets=targets, z_loss=z_loss)
        found = value_and_gradients(f, wide[0], wide[1], targets, wide[2])
        return jax.tree.map(np.asarray, found)


def assert_close(got, want, bound=2e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_size", [1, 20, 37, 512])
def test_value_and_gradients(chunk_size, z_loss):
    args = inputs()
    assert_close(ours(*args, chunk_size=chunk_size, z_loss=z_loss), exact(*args, z_loss))


def test_large_logits():
    hidden, *rest = inputs()
    assert_close(ours(100 * hidden, *rest), exact(100 * hidden, *rest), bound=1e-5)


def test_without_any_weight():
    hidden, kernel, targets, weights = inputs()
    (total, nll), gradients = ours(hidden, kernel, targets, 0 * weights)
    assert total == 0.0
    assert np.isfinite(nll).all()
    assert not gradients[0].any()
    assert not gradients[1].any()


def test_nll_carries_no_gradient():
    hidden, kernel, targets, weights = inputs()

    def f(hidden):
        return chunked_cross_entropy(hidden, kernel, targets, weights)[1].sum()

    assert not jax.grad(f)(hidden).any()


def test_bfloat16_operands_float32_statistics():
    args = inputs(dim=64)
    (total, nll), gradients = ours(*args, dtype="bfloat16", chunk_size=20)
    (want, _), want_gradients = exact(*args)
    assert nll.dtype == total.dtype == jnp.float32
    assert abs(total / want - 1) < 2e-3
    for a, b in zip(gradients[:2], want_gradients[:2], strict=True):
        assert a.dtype == jnp.float32  # of float32 inputs: not rounded to bfloat16 on the way
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def temporaries(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_logits_never_exist_whole():
    hidden, kernel, targets, weights = inputs(batch=2, length=1024, dim=8, vocab=1000)
    logits_bytes = 2 * 1024 * 1000 * 4

    def f(hidden, kernel, loss):
        return jax.grad(lambda *x: loss(*x)[0], (0, 1))(hidden, kernel)

    def chunked(hidden, kernel):
        return chunked_cross_entropy(hidden, kernel, targets, weights, chunk_size=64)

    def whole(hidden, kernel):
        return plain(hidden, kernel, weights, targets, 0.0)

    assert temporaries(partial(f, loss=whole), hidden, kernel) >= logits_bytes  # the probe can fail
    assert temporaries(partial(f, loss=chunked), hidden, kernel) < logits_bytes / 4


def test_evaluation_computes_no_gradients():
    args = inputs()

    def num_dots(f, *args):
        return jax.jit(f).lower(*args).compile().as_text().count(" dot(")

    evaluate = num_dots(chunked_cross_entropy, *args)
    train = num_dots(jax.grad(lambda *x: chunked_cross_entropy(*x)[0], (0, 1)), *args)
    assert (evaluate, train) == (1, 3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel_DV": jnp.ones((D + 1, V))}, r"\(17, 50\)"),
        ({"targets_BT": jnp.ones((B, T + 1), jnp.int32)}, r"\(2, 38\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_bad_calls_are_one_line_errors(change, words):
    names = ("hidden_BTD", "kernel_DV", "targets_BT", "weights_BT")
    with pytest.raises(ValueError, match=words) as error:
        chunked_cross_entropy(**{**dict(zip(names, inputs(), strict=True)), **change})
    assert "\n" not in str(error.value)


MESHES = """
import re
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.objectives.cross_entropy_test import V, inputs, ours, value_and_gradients
from lcl.objectives import chunked_cross_entropy

hidden, kernel, targets, weights = inputs(batch=8, length=22, vocab=48)
want = ours(hidden, kernel, targets, weights, z_loss=0.01, chunk_size=40)

@jax.jit
def run(hidden, kernel, targets, weights):
    def f(hidden, kernel, weights):
        return chunked_cross_entropy(
            hidden, kernel, targets, weights, z_loss=0.01, chunk_size=10
        )
    return value_and_gradients(f, hidden, kernel, targets, weights)

names = ("data", "fsdp", "context", "tensor")
for sizes in ((8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8)):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
        args = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
        args.insert(1, jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "tensor"))))
        for a, b in zip(jax.tree.leaves(run(*args)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6 * np.abs(b).max())
        text = run.lower(*args).compile().as_text()
        gathered = re.findall(r"f32\\[([\\d,]*)\\]\\S* all-gather\\(", text)
        # Of the whole, only the kernel is ever put together, and at most once.
        vocab = str(48 // sizes[3])
        assert gathered in ([], [f"16,{vocab}"]), (sizes, gathered)

# A batch and a vocabulary that no axis divides are right all the same.
hidden, kernel, targets, weights = inputs(batch=3, length=7, vocab=50)
want = ours(hidden, kernel, targets, weights, z_loss=0.01)
with jax.set_mesh(jax.make_mesh((2, 2, 1, 2), names, axis_types=(AxisType.Auto,) * 4)):
    got = run(hidden, kernel, targets, weights)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6 * np.abs(b).max())
print("meshes ok")
"""


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
