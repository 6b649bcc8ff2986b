"""The oracle itself, held to loops in NumPy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lcl.attention import Mask
from lcl.attention.reference import reference
from lcl.attention.rows import Rows
from tests.attention.helpers import forward_and_gradients, inputs, segments


def by_loops(q, k, v, seen_BTS, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        (keys,) = np.nonzero(seen_BTS[b, t])
        if len(keys):
            scores = scale * k[b, keys, n // group] @ q[b, t, n]
            p = np.exp(scores - scores.max())
            out[b, t, n] = p @ v[b, keys, n // group] / p.sum()
    return out


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(window=3), Mask(prefix_length=5), Mask(causal=False)]
)
def test_equals_loops_with_documents_and_permuted_rows(mask, num_kv_heads):
    q, k, v, _ = inputs(2, 11, 4, num_kv_heads, head_dim=8)
    segment_ids = np.array(segments("tail", 2, 11))
    row_index = np.stack([np.random.default_rng(i).permutation(11) for i in range(2)])
    out = reference(q, k, v, mask=mask, query=Rows(row_index, segment_ids), scale=0.7)
    want = by_loops(q, k, v, mask.dense(row_index, segment_ids), 0.7)
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_permuting_the_row_permutes_the_output():
    q, k, v, g = inputs(1, 12, 2, 2, head_dim=4)
    segment_ids = segments("tail", 1, 12)
    order = np.random.default_rng(0).permutation(12)
    plain = forward_and_gradients(q, k, v, g, segment_ids, impl="reference")
    shuffled = forward_and_gradients(
        *(x[:, order] for x in (q, k, v, g, segment_ids)),
        jnp.asarray(order[None]),
        impl="reference",
    )
    for a, b in zip(plain, shuffled, strict=True):
        np.testing.assert_allclose(a[:, order], b, atol=1e-6)


def test_gradient_is_the_slope():
    with jax.enable_x64(True):
        q, k, v, g = (x.astype(jnp.float64) for x in inputs(1, 5, 2, 1, head_dim=3))

        def f(q, k, v):
            return jnp.sum(
                g * reference(q, k, v, mask=Mask(), query=Rows(None, jnp.array([[1, 1, 2, 2, 0]])))
            )

        check_grads(f, (q, k, v), order=1, modes=("rev",))


def test_rows_without_keys_give_zero_and_no_nan():
    q, k, v, g = inputs(1, 6, 2, 2)
    segment_ids = jnp.array([[1, 1, 0, 0, 0, 0]])
    out, dq, dk, dv = forward_and_gradients(q, k, v, g, segment_ids, impl="reference")
    for x in (out, dq, dk, dv):
        assert not np.asarray(x)[:, 2:].any()
        assert np.isfinite(x).all()
