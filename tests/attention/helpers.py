"""Inputs, oracles and probes shared by the attention tests."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lcl.attention import Mask, attend


def inputs(batch, length, num_heads, num_kv_heads, head_dim=16, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent for the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return tuple(
        jax.random.normal(key, (batch, length, n, head_dim)).astype(dtype)
        for key, n in zip(keys, heads, strict=True)
    )


def segments(kind: str, batch: int, length: int, seed: int = 0):
    """int32 [batch, length] of one of the layouts that every kernel must get right."""
    if kind == "none":
        return None
    if kind == "one":
        return jnp.ones((batch, length), jnp.int32)
    rng = np.random.default_rng(seed)
    cuts = rng.random((batch, length)) < max(4 / length, 0.01)
    ids = 1 + np.cumsum(cuts, axis=1)
    if kind == "tail":
        ids = np.where(np.arange(length) < length - length // 3, ids, 0)
    return jnp.asarray(ids, jnp.int32)


@partial(jax.jit, static_argnames=("impl", "mask"))
def forward_and_gradients(q, k, v, g, segment_ids, row_index=None, *, impl, mask=Mask()):  # noqa: B008
    """Output, dq, dk, dv."""
    run = partial(attend, impl=impl, mask=mask, segment_ids_BT=segment_ids, row_index_BT=row_index)
    out, vjp = jax.vjp(run, q, k, v)
    return out, *vjp(g)


def assert_matches_reference(q, k, v, g, segment_ids, *, mask, forward=2e-6, gradient=1e-5):
    """Blockwise against dense: output and three gradients, relative to their largest value."""
    got = forward_and_gradients(q, k, v, g, segment_ids, impl="blockwise", mask=mask)
    want = forward_and_gradients(q, k, v, g, segment_ids, impl="reference", mask=mask)
    for name, a, b, bound in zip(
        ("out", "dq", "dk", "dv"), got, want, (forward, gradient, gradient, gradient), strict=True
    ):
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(
            a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max()), err_msg=name
        )
