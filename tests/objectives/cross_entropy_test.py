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
@pytest.mark.parametrize(
    "chunks", [(1, None), (20, None), (37, None), (512, None), (20, 7), (2, 25), (512, 64)]
)
def test_value_and_gradients(chunks, z_loss):
    args = inputs()
    got = ours(*args, chunk_size=chunks[0], vocab_chunk=chunks[1], z_loss=z_loss)
    assert_close(got, exact(*args, z_loss))


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_large_logits(vocab_chunk):
    hidden, *rest = inputs()
    got = ours(100 * hidden, *rest, vocab_chunk=vocab_chunk)
    assert_close(got, exact(100 * hidden, *rest), bound=1e-5)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_without_any_weight(vocab_chunk):
    hidden, kernel, targets, weights = inputs()
    (total, nll), gradients = ours(hidden, kernel, targets, 0 * weights, vocab_chunk=vocab_chunk)
    assert total == 0.0
    assert np.isfinite(nll).all()
    assert not gradients[0].any()
    assert not gradients[1].any()


def test_nll_carries_no_gradient():
    hidden, kernel, targets, weights = inputs()

    def f(hidden):
        return chunked_cross_entropy(hidden, kernel, targets, weights)[1].sum()

    assert not jax.grad(f)(hidden).any()


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_bfloat16_operands_float32_statistics(vocab_chunk):
    args = inputs(dim=64)
    (total, nll), gradients = ours(*args, dtype="bfloat16", chunk_size=20, vocab_chunk=vocab_chunk)
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
    by_vocabulary = partial(chunked_cross_entropy, vocab_chunk=7)
    evaluate = num_dots(by_vocabulary, *args)
    train = num_dots(jax.grad(lambda *x: by_vocabulary(*x)[0], (0, 1)), *args)
    assert (evaluate, train) == (1, 4)  # the logits are made twice


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel_DV": jnp.ones((D + 1, V))}, r"\(17, 50\)"),
        ({"targets_BT": jnp.ones((B, T + 1), jnp.int32)}, r"\(2, 38\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"vocab_chunk": 0}, "vocab_chunk=0"),
    ],
)
def test_bad_calls_are_one_line_errors(change, words):
    names = ("hidden_BTD", "kernel_DV", "targets_BT", "weights_BT")
    with pytest.raises(ValueError, match=words) as error:
        chunked_cross_entropy(**{**dict(zip(names, inputs(), strict=True)), **change})
    assert "\n" not in str(error.value)


MESHES = """
import re
from functools import partial
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.objectives.cross_entropy_test import V, inputs, ours, value_and_gradients
from lcl.objectives import chunked_cross_entropy

hidden, kernel, targets, weights = inputs(batch=8, length=24, vocab=48)
want = ours(hidden, kernel, targets, weights, z_loss=0.01, chunk_size=40)

@partial(jax.jit, static_argnums=(4, 5, 6))
def run(hidden, kernel, targets, weights, vocab_chunk=None, keep_head=False, summed_in="float32"):
    def f(hidden, kernel, weights):
        return chunked_cross_entropy(
            hidden, kernel, targets, weights, z_loss=0.01, chunk_size=10, vocab_chunk=vocab_chunk,
            keep_head=keep_head, gradient_dtype=summed_in,
        )
    return value_and_gradients(f, hidden, kernel, targets, weights)

def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6 * np.abs(b).max())

def shapes(kind, text):
    return re.findall(rf"f32\\[([\\d,]*)\\]\\S* {kind}\\(", text)

names = ("data", "fsdp", "context", "tensor")
for sizes in ((8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 4, 1), (1, 4, 2, 1), (1, 1, 1, 8)):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
        args = [jax.device_put(x, rows) for x in (hidden, targets, weights)]
        place = NamedSharding(mesh, P(("fsdp", "context"), "tensor"))
        args.insert(1, jax.device_put(kernel, place))
        cut, vocab = sizes[1] * sizes[2], 48 // sizes[3]
        for columns, keep_head in ((None, False), (5, False), (5, True)):
            compiled = run.lower(*args, columns, keep_head).compile()
            got = compiled(*args)
            check(got, want)
            assert cut == 1 or got[1][1].sharding.is_equivalent_to(place, 2), got[1][1].sharding
            text = compiled.as_text()
            # One pass puts the kernel together once; by vocabulary, only chunks of it ever are.
            gathered = set(shapes("all-gather", text))
            piece = f"16,{vocab if columns is None else 5}"
            assert gathered == ({piece} if cut > 1 else set()), (sizes, columns, gathered)
            # Where the mesh cuts the kernel, no gradient of the kernel is summed whole.
            summed = shapes("all-reduce", text)
            assert cut == 1 or not {f"16,{vocab}", "16,5"} & set(summed), (sizes, columns, summed)
            # Kept, a piece of the head is gathered at two places only: the first, and in pass 1.
            places = len(shapes("all-gather", text))
            assert cut == 1 or places == (1 if columns is None else 2 if keep_head else 3), places
        narrow = run(*args, 5, True, "bfloat16")
        check(narrow[0], want[0])
        error = np.abs(np.asarray(narrow[1][1]) - want[1][1]).max() / np.abs(want[1][1]).max()
        assert error < 2**-7, error
        assert cut == 1 or error > 2**-14, error

# A batch, a length and a vocabulary that no axis divides are right all the same.
hidden, kernel, targets, weights = inputs(batch=3, length=7, vocab=50)
want = ours(hidden, kernel, targets, weights, z_loss=0.01)
with jax.set_mesh(jax.make_mesh((1, 2, 2, 2), names, axis_types=(AxisType.Auto,) * 4)):
    for columns in (None, 6):
        check(run(hidden, kernel, targets, weights, columns), want)
print("meshes ok")
"""


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
