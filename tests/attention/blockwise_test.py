"""The blockwise kernel against the dense reference: forward and all three gradients.

Cases that differ in data only (documents, orders of tokens) stand along the batch, so that one
compiled program serves them all.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.attention import Mask
from lcl.attention.block_pairs import block_pairs, block_rows, default_block, visits
from lcl.attention.blockwise import blockwise, blockwise_backward, blockwise_forward
from lcl.attention.layouts import permutation
from lcl.attention.reference import reference
from lcl.attention.rows import Rows
from tests.attention.helpers import inputs, segments

HEADS = [(4, 4), (4, 2), (4, 1)]  # multi-head, grouped, multi-query
LENGTH = 208


def gradients(kernel, q, k, v, g, **kwargs):
    """Output, dq, dk, dv."""
    out, vjp = jax.vjp(lambda *x: kernel(*x, **kwargs), q, k, v)
    return out, *vjp(g)


STATIC = ("mask", "block", "soft_cap", "scale")
run_blockwise = jax.jit(partial(gradients, blockwise), static_argnames=STATIC)
run_reference = jax.jit(partial(gradients, reference), static_argnames=STATIC)


def assert_close(got, want, bound=1e-5):
    """Output and three gradients, relative to their largest value."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.isfinite(a).all(), name
        largest = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest, err_msg=name)


def compare(q, k, v, g, *, block=64, bound=1e-5, **kwargs):
    got = run_blockwise(q, k, v, g, block=block, **kwargs)
    assert_close(got, run_reference(q, k, v, g, **kwargs), bound)


def every_case() -> Rows:
    """Four segmentations in four orders: 16 rows."""
    order = np.arange(LENGTH)
    spanning = np.where((order > 5) & (order < LENGTH - 40), 2, 1)  # one document over all shards
    spanning = np.where(order >= LENGTH - 40, 0, spanning)
    documents = [
        np.ones(LENGTH),
        np.asarray(segments("many", 1, LENGTH)[0]),
        np.asarray(segments("tail", 1, LENGTH)[0]),
        spanning,
    ]
    orders = [
        order,
        permutation("zigzag", LENGTH, 4),
        permutation("striped", LENGTH, 4),
        np.random.default_rng(0).permutation(LENGTH),
    ]
    pairs = [(np.asarray(o), d[np.asarray(o)]) for d in documents for o in orders]
    row_index, segment_ids = (jnp.asarray(np.stack(x), jnp.int32) for x in zip(*pairs, strict=True))
    return Rows(row_index, segment_ids)


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=70)], ids=["causal", "window"])
def test_documents_and_orders(mask, num_heads, num_kv_heads):
    rows = every_case()
    args = inputs(len(rows.row_index_BT), LENGTH, num_heads, num_kv_heads, head_dim=8)
    compare(*args, mask=mask, query=rows)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=False),
        Mask(causal=False, window=40),
        Mask(prefix_length=130),
        Mask(window=1),
        Mask(window=100, prefix_length=500),
    ],
    ids=["all", "near", "prefix", "self", "near-prefix"],
)
def test_other_masks(mask):
    rows = every_case()
    compare(*inputs(len(rows.row_index_BT), LENGTH, 1, 1, head_dim=8), mask=mask, query=rows)
    compare(*inputs(1, LENGTH, 1, 1, head_dim=8), mask=mask)


@pytest.mark.parametrize("length", [1, 2, 127, 129, 700])
def test_lengths_in_order_with_the_default_block(length):
    args = inputs(1, length, 2, 1)
    compare(*args, mask=Mask(), block=None)
    compare(*args, mask=Mask(), block=None, query=Rows(None, segments("tail", 1, length)))


@settings(max_examples=40)
@given(data=st.data())
def test_any_segmentation_in_any_order(data):
    """Random documents, in order (as packing makes them) or not; one shape, so one compilation."""
    length = 230
    runs = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 150)), min_size=1, max_size=12)
    )
    ids = np.concatenate([np.full(n, i) for i, n in runs])
    ids = np.append(np.sort(ids) if data.draw(st.booleans()) else ids, np.zeros(length))[:length]
    kind = data.draw(st.sampled_from(["contiguous", "zigzag", "striped", "random"]))
    if kind == "random":
        order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(length)
    else:
        order = np.asarray(permutation(kind, length, 5))
    rows = Rows(jnp.asarray(order[None], jnp.int32), jnp.asarray(ids[order][None], jnp.int32))
    compare(*inputs(1, length, 2, 1, head_dim=8), mask=Mask(), query=rows, block=32)


@pytest.mark.parametrize(
    "num_queries, num_keys", [(1, 150), (40, 200), (200, 40)], ids=["decode", "chunk", "few-keys"]
)
def test_queries_and_keys_of_different_lengths(num_queries, num_keys):
    q, _, _, g = inputs(2, num_queries, 4, 2, head_dim=8)
    _, k, v, _ = inputs(2, num_keys, 4, 2, head_dim=8, seed=1)
    first = max(0, num_keys - num_queries)  # the queries are the last tokens, or go on beyond them
    row_index = jnp.broadcast_to(first + jnp.arange(num_queries, dtype=jnp.int32), (2, num_queries))
    compare(q, k, v, g, mask=Mask(), query=Rows(row_index), key=Rows())
    ids = segments("many", 2, first + num_queries)
    query, key = Rows(row_index, ids[:, first:]), Rows(None, ids[:, :num_keys])
    compare(q, k, v, g, mask=Mask(window=60), query=query, key=key)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap):
    rows = every_case()
    args = inputs(len(rows.row_index_BT), LENGTH, 2, 1, head_dim=8)
    compare(*args, mask=Mask(), query=rows, soft_cap=soft_cap, scale=1.0)


def test_parts_joined_by_their_log_sum_exp_are_the_whole():
    """What a ring does: three parts of the keys, one of them unseen by most queries."""
    rows = every_case()
    q, k, v, g = inputs(len(rows.row_index_BT), LENGTH, 4, 2, head_dim=8)
    want = run_reference(q, k, v, g, mask=Mask(), query=rows)
    parts = [slice(0, 104), slice(104, 200), slice(200, 208)]

    @jax.jit
    def joined(q, k, v, g, rows):
        kwargs = [
            dict(mask=Mask(), query=rows, key=Rows(*(x[:, p] for x in rows)), block=64)
            for p in parts
        ]
        done = [blockwise_forward(q, k[:, p], v[:, p], **x) for p, x in zip(parts, kwargs)]  # noqa: B905
        lse_BTN = jax.nn.logsumexp(jnp.stack([lse for _, lse in done]), axis=0)
        safe_BTN = jnp.where(jnp.isneginf(lse_BTN), 0.0, lse_BTN)
        out = sum(x * jnp.exp(lse - safe_BTN)[..., None] for x, lse in done)
        delta_BTN = jnp.sum(out * g, axis=-1)
        back = [
            blockwise_backward(q, k[:, p], v[:, p], lse_BTN, delta_BTN, g, **x)
            for p, x in zip(parts, kwargs)  # noqa: B905
        ]
        dq, dk, dv = zip(*back)  # noqa: B905
        return (out, sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), lse_BTN, done

    got, lse_BTN, done = joined(q, k, v, g, rows)
    assert_close(got, want)
    hidden = np.asarray(rows.segment_ids_BT) == 0
    assert hidden.any() and np.isneginf(lse_BTN).all(-1).tolist() == hidden.tolist()
    for out, lse in done:
        assert out.dtype == lse.dtype == jnp.float32
        assert not np.asarray(out)[np.isneginf(lse)].any()


def test_large_scores_stay_finite():
    q, k, v, g = inputs(1, 200, 2, 2)
    rows = Rows(None, segments("many", 1, 200))
    compare(q * 60, k * 60, v, g, mask=Mask(), query=rows, bound=2e-4)


def test_rows_without_keys_give_zero_and_no_nan():
    q, k, v, g = inputs(2, 300, 2, 1)
    segment_ids = jnp.stack([jnp.zeros(300, jnp.int32), jnp.arange(300) // 50 % 2]).astype(
        jnp.int32
    )
    hidden = np.asarray(segment_ids) == 0
    for x in run_blockwise(q, k, v, g, mask=Mask(), query=Rows(None, segment_ids)):
        assert np.isfinite(x).all()
        assert not np.asarray(x)[hidden].any()
        assert np.asarray(x)[~hidden].any()


def test_queries_before_every_key_give_zero():
    q, k, v, g = inputs(1, 70, 2, 1)
    key = Rows(jnp.arange(30, 100, dtype=jnp.int32)[None])
    out, dq, dk, dv = run_blockwise(q, k, v, g, mask=Mask(), query=Rows(), key=key, block=32)
    assert not np.asarray(out)[:, :30].any() and np.asarray(out)[:, 30:].any()
    assert not np.asarray(dq)[:, :30].any()
    for x in (dk, dv):  # queries reach row 69, which is key 39
        assert not np.asarray(x)[:, 40:].any() and np.asarray(x)[:, :40].any()


def test_bfloat16():
    args = inputs(1, 300, 2, 1, dtype=jnp.bfloat16)
    rows = Rows(None, segments("many", 1, 300))
    got = run_blockwise(*args, mask=Mask(), query=rows)
    want = run_reference(*(x.astype(jnp.float32) for x in args), mask=Mask(), query=rows)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(np.float32) - b) < 1e-2 * np.linalg.norm(b)


def test_memory_is_linear_in_the_row():
    """Temporaries are a few [T, H] of one head, not copies of all heads, and never [T, S]."""

    def temporaries(length):
        args = inputs(1, length, 8, 8)
        lowered = run_blockwise.lower(
            *args, mask=Mask(), query=Rows(None, segments("many", 1, length))
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes, args[0].nbytes

    small, _ = temporaries(1024)
    large, argument = temporaries(4096)
    assert large < 4.5 * small
    assert large < 3 * argument


def test_only_blocks_that_meet_are_visited():
    """The counts behind the speed: what is skipped, and what needs no mask."""

    def counts(mask, row_index, segment_ids, block=16):
        rows = Rows(
            *(None if x is None else jnp.asarray(x)[None] for x in (row_index, segment_ids))
        )
        length = len(segment_ids if row_index is None else row_index)
        blocked = block_rows(rows, 1, length, block, repeat_last=False)
        visit = visits(*block_pairs(mask, blocked, blocked))
        return int(visit.num_BI.sum()), int(visit.num_full_BI.sum())

    order = np.arange(128, dtype=np.int32)
    assert counts(Mask(), order, None) == (36, 28)
    assert counts(Mask(causal=False), order, None) == (64, 64)
    assert counts(Mask(window=16), order, None) == (15, 0)
    assert counts(Mask(), None, order // 32 + 1) == (12, 4)  # four documents of two blocks
    assert counts(Mask(), None, np.where(order < 64, 1, 0)) == (10, 6)  # padding costs nothing
    zigzag = np.asarray(permutation("zigzag", 128, 4), np.int32)
    assert counts(Mask(), zigzag, None) == (36, 28)  # a balanced row costs what a plain one does


def test_the_table_of_blocks_stays_small():
    assert [default_block(n) for n in (1, 8192, 1 << 18, 1 << 20)] == [128, 128, 128, 512]
    assert all((n // default_block(n)) ** 2 * 4 <= 1 << 24 for n in (1 << 16, 1 << 20, 1 << 22))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask": Mask(explicit=np.tri(20))}, "explicit"),
        ({"block": 0}, "block=0"),
        ({"key": Rows(None, jnp.ones((1, 20), jnp.int32))}, "one side"),
    ],
)
def test_bad_calls_are_one_line_errors(change, words):
    q, k, v, _ = inputs(1, 20, 2, 1)
    with pytest.raises(ValueError, match=words) as error:
        blockwise(q, k, v, **{"mask": Mask(), **change})
    assert "\n" not in str(error.value)


def leaks(kernel, documents, told: Rows) -> int:
    """Positions of other documents that move when one token of document 1 changes."""
    length = len(documents)
    q, k, v, g = inputs(1, length, 2, 1)
    place = int(np.flatnonzero(documents == 1)[3])
    moved = [x.at[0, place].add(1.0) for x in (q, k, v)]
    others = documents != 1
    count = 0
    for a, b in zip(
        kernel(q, k, v, g, mask=Mask(), query=told),
        kernel(*moved, g, mask=Mask(), query=told),
        strict=True,
    ):
        count += int((np.asarray(a != b)[0].any((1, 2)) & others).sum())
    return count


@pytest.mark.parametrize("kernel", [run_blockwise, run_reference])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_no_document_leaks_into_another(kernel, kind):
    order = np.asarray(permutation(kind, 400, 4))
    documents = np.asarray(segments("tail", 1, 400)[0])[order]
    row_index = jnp.asarray(order[None], jnp.int32)
    assert leaks(kernel, documents, Rows(row_index, jnp.asarray(documents[None]))) == 0


@pytest.mark.parametrize("kernel", [run_blockwise, run_reference])
def test_the_leak_probe_catches_an_attention_without_segments(kernel):
    documents = np.asarray(segments("many", 1, 400)[0])
    num_others = int((documents != 1).sum())
    # The output of every later token moves; the gradients of most do as well.
    assert num_others > 100
    assert leaks(kernel, documents, Rows()) >= num_others


def test_under_vmap_and_remat():
    q, k, v, g = inputs(3, 130, 2, 2)
    segment_ids = segments("many", 3, 130)
    want = run_reference(q, k, v, g, mask=Mask(), query=Rows(None, segment_ids))

    @jax.jit
    @jax.vmap
    def every(q, k, v, g, segment_ids):
        kernel = jax.checkpoint(partial(blockwise, mask=Mask(), query=Rows(None, segment_ids)))
        return gradients(kernel, q, k, v, g)

    got = every(*(x[:, None] for x in (q, k, v, g, segment_ids)))
    assert_close([x[:, 0] for x in got], want)
