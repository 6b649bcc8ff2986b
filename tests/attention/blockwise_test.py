"""The blockwise kernel against the dense reference: forward and all three gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.attention import Mask
from tests.attention.helpers import (
    assert_matches_reference,
    forward_and_gradients,
    inputs,
    segments,
)

HEADS = [(4, 4), (4, 2), (4, 1)]  # multi-head, grouped, multi-query


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS)
@pytest.mark.parametrize("kind", ["none", "one", "many", "tail"])
@pytest.mark.parametrize("mask", [Mask(), Mask(window=70)], ids=["causal", "window"])
def test_layouts_and_heads(mask, kind, num_heads, num_kv_heads):
    q, k, v, g = inputs(2, 389, num_heads, num_kv_heads)
    assert_matches_reference(q, k, v, g, segments(kind, 2, 389), mask=mask)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 700])
def test_lengths(length):
    q, k, v, g = inputs(1, length, 2, 1)
    assert_matches_reference(q, k, v, g, segments("tail", 1, length), mask=Mask())


@pytest.mark.parametrize("kind", ["none", "tail"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=False),
        Mask(causal=False, window=40),
        Mask(prefix_length=150),
        Mask(prefix_length=500),
        Mask(window=1),
        Mask(window=100, prefix_length=200),
    ],
    ids=["all", "near", "prefix", "long-prefix", "self", "near-prefix"],
)
def test_other_masks(mask, kind):
    q, k, v, g = inputs(1, 300, 2, 2)
    assert_matches_reference(q, k, v, g, segments(kind, 1, 300), mask=mask)


def test_long_row():
    q, k, v, g = inputs(1, 2500, 2, 1)
    assert_matches_reference(q, k, v, g, segments("many", 1, 2500), mask=Mask())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_segmentation(data):
    """Random documents, in order (as packing makes them) or not; one shape, so one compilation."""
    runs = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 200)), min_size=1, max_size=12)
    )
    ids = np.concatenate([np.full(n, i) for i, n in runs])
    if data.draw(st.booleans()):
        ids = np.sort(ids)
    ids = np.resize(ids, 330) if data.draw(st.booleans()) else np.append(ids, np.zeros(330))[:330]
    q, k, v, g = inputs(1, 330, 2, 1, head_dim=8)
    assert_matches_reference(q, k, v, g, jnp.asarray(ids[None], jnp.int32), mask=Mask())


def test_large_scores_stay_finite():
    q, k, v, g = inputs(1, 200, 2, 2)
    assert_matches_reference(
        q * 60, k * 60, v, g, segments("many", 1, 200), mask=Mask(), forward=2e-4, gradient=2e-4
    )


def test_rows_without_keys_give_zero_and_no_nan():
    q, k, v, g = inputs(2, 300, 2, 1)
    segment_ids = jnp.stack([jnp.zeros(300, jnp.int32), jnp.arange(300) // 50 % 2]).astype(
        jnp.int32
    )
    hidden = np.asarray(segment_ids) == 0
    for x in forward_and_gradients(q, k, v, g, segment_ids, impl="blockwise"):
        assert np.isfinite(x).all()
        assert not np.asarray(x)[hidden].any()
        assert np.asarray(x)[~hidden].any()


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_bfloat16(num_kv_heads):
    args = inputs(1, 300, 2, num_kv_heads, dtype=jnp.bfloat16)
    segment_ids = segments("many", 1, 300)
    got = forward_and_gradients(*args, segment_ids, impl="blockwise")
    want = forward_and_gradients(
        *(x.astype(jnp.float32) for x in args), segment_ids, impl="reference"
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(np.float32) - b) < 1e-2 * np.linalg.norm(b)


def test_memory_is_linear_in_the_row():
    def temporaries(length):
        args = inputs(1, length, 2, 1)
        lowered = forward_and_gradients.lower(*args, segments("many", 1, length), impl="blockwise")
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(4096)
    assert large < 4.5 * small
    assert large < 4096 * 4096 * 4 / 2  # less than one head's scores


def leaks(impl: str, segment_ids, told_segments) -> int:
    """Positions of other documents that move when one token of document 1 changes."""
    length = segment_ids.shape[1]
    q, k, v, g = inputs(1, length, 2, 1)
    moved = [x.at[0, 3].add(1.0) for x in (q, k, v)]
    others = np.asarray(segment_ids[0]) != 1
    count = 0
    for a, b in zip(
        forward_and_gradients(q, k, v, g, told_segments, impl=impl),
        forward_and_gradients(*moved, g, told_segments, impl=impl),
        strict=True,
    ):
        count += int((np.asarray(a != b)[0].any((1, 2)) & others).sum())
    return count


@pytest.mark.parametrize("impl", ["blockwise", "reference"])
def test_no_document_leaks_into_another(impl):
    segment_ids = segments("tail", 1, 400)
    assert leaks(impl, segment_ids, segment_ids) == 0


@pytest.mark.parametrize("impl", ["blockwise", "reference"])
def test_the_leak_probe_catches_an_attention_without_segments(impl):
    segment_ids = segments("many", 1, 400)
    num_others = int((segment_ids != 1).sum())
    # The output of every later token moves; the gradients of most do as well.
    assert num_others > 100
    assert leaks(impl, segment_ids, None) >= num_others


def test_under_vmap_and_remat():
    q, k, v, g = inputs(3, 130, 2, 2)
    segment_ids = segments("many", 3, 130)
    want = forward_and_gradients(q, k, v, g, segment_ids, impl="reference")

    def one(q, k, v, g, segment_ids):
        run = jax.checkpoint(lambda *x: forward_and_gradients(*x, impl="blockwise"))
        return run(q, k, v, g, segment_ids)

    got = jax.vmap(one)(*(x[:, None] for x in (q, k, v, g, segment_ids)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:, 0], b, atol=1e-5)
