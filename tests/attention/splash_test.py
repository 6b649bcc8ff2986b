"""Splash against the dense oracle, interpreted: whole rows, parts of rows, and inside shard_map."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.attention import layouts, splash_jax
from lcl.attention.mask import Mask
from lcl.attention.reference import reference
from lcl.attention.rows import Relation, Rows
from lcl.attention.splash import BlockSizes, splash, splash_flops, splash_obstacle
from lcl.attention.splash_partial import splash_backward, splash_forward
from lcl.attention.splash_tables import QueryRows, Rule, backward_table, forward_table
from tests.attention.helpers import inputs

LENGTH = 256
SMALL = BlockSizes(query=128, key=128)
# One document; many and a padding tail; padding in front, and a document of one token.
SEGMENTS = np.ones((3, LENGTH), np.int32)
SEGMENTS[1] = np.repeat([1, 2, 3, 0], [100, 60, 56, 40])
SEGMENTS[2] = np.repeat([0, 1, 2, 3], [130, 1, 64, 61])


def arrays(num_heads=2, num_kv_heads=1, dtype=jnp.float32):
    return inputs(len(SEGMENTS), LENGTH, num_heads, num_kv_heads, head_dim=16, dtype=dtype)


def whole(kernel, q, k, v, g):
    """Output, dq, dk, dv."""
    out, vjp = jax.vjp(kernel, q, k, v)
    return out, *vjp(g)


def oracle(mask, q, k, v, g, soft_cap=None):
    rows = Rows(segment_ids_BT=jnp.asarray(SEGMENTS))
    return whole(partial(reference, mask=mask, query=rows, soft_cap=soft_cap), q, k, v, g)


def assert_close(got, want, forward=2e-6, gradient=1e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        bound = (forward if name == "out" else gradient) * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=name)
    for a in got:  # padding: not small, but 0
        assert not np.asarray(a)[SEGMENTS == 0].any()


@pytest.mark.parametrize(
    ("mask", "num_kv_heads", "soft_cap", "blocks"),
    [
        (Mask(), 1, None, SMALL),
        (Mask(window=50), 2, None, SMALL),
        (Mask(prefix_length=70), 1, None, BlockSizes()),
        (Mask(causal=False), 1, 2.0, SMALL),
        (Mask(causal=False, window=33), 1, None, BlockSizes(query=256, key=128)),
        (Mask(window=100), 2, 2.0, BlockSizes(query=128, key=128, fused_backward=True)),
    ],
    ids=("causal-mqa", "window-mha", "prefix", "full-cap", "window-both-sides", "fused"),
)
def test_row_matches_reference(mask, num_kv_heads, soft_cap, blocks):
    q, k, v, g = arrays(num_kv_heads=num_kv_heads)
    kernel = partial(
        splash,
        mask=mask,
        segment_ids_BT=jnp.asarray(SEGMENTS),
        soft_cap=soft_cap,
        block_sizes=blocks,
        interpret=True,
    )
    assert_close(jax.jit(partial(whole, kernel))(q, k, v, g), oracle(mask, q, k, v, g, soft_cap))


def test_bfloat16_and_scale():
    q, k, v, g = arrays(dtype=jnp.bfloat16)
    settings = dict(mask=Mask(), scale=0.3)
    kernel = partial(splash, block_sizes=SMALL, interpret=True, **settings)
    got = jax.jit(partial(whole, kernel))(q, k, v, g)
    want = whole(partial(reference, **settings), *(x.astype(jnp.float32) for x in (q, k, v, g)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        bound = 0.02 * float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("layout", "window", "soft_cap"),
    [("contiguous", None, 2.0), ("contiguous", 30, None), ("striped", None, None)],
)
def test_parts_make_the_whole(layout, window, soft_cap):
    """Every relation of a ring of two; with a window of 30 most queries see no key of the other."""
    half = LENGTH // 2
    if layout == "contiguous":
        own = Relation(window=window)
        ahead = Relation(causal=False) if window is None else Relation(offset=half, window=window)
        cases = {(0, 0): own, (1, 1): own, (1, 0): ahead}
    else:
        own, before = Relation(), Relation(offset=-1)
        cases = {(0, 0): own, (1, 1): own, (1, 0): own, (0, 1): before}
    order = layouts.permutation(layout, LENGTH, 2)
    place = layouts.inverse(layout, LENGTH, 2)
    settings = dict(soft_cap=soft_cap, block_sizes=SMALL, interpret=True)

    @jax.jit
    def ring(q, k, v, g):
        parts = [[x[:, order[:half]], x[:, order[half:]]] for x in (q, k, v, g, SEGMENTS)]
        q, k, v, g, documents = parts
        outs, lses = [], []
        for me in range(2):
            seen = [
                splash_forward(
                    q[me],
                    k[other],
                    v[other],
                    relation=relation,
                    query_segments_BT=documents[me],
                    key_segments_BS=documents[other],
                    **settings,
                )
                for (who, other), relation in cases.items()
                if who == me
            ]
            lse = jax.nn.logsumexp(jnp.stack([one for _, one in seen]), axis=0)
            weights = [jnp.where(one > -jnp.inf, jnp.exp(one - lse), 0) for _, one in seen]
            outs.append(sum(w[..., None] * out for w, (out, _) in zip(weights, seen, strict=True)))
            lses.append(lse)
        dq, dk, dv = ([0.0, 0.0] for _ in range(3))
        for (me, other), relation in cases.items():
            shares = splash_backward(
                q[me],
                k[other],
                v[other],
                lses[me],
                jnp.sum(outs[me] * g[me], axis=-1),
                g[me],
                relation=relation,
                query_segments_BT=documents[me],
                key_segments_BS=documents[other],
                **settings,
            )
            for total, who, share in zip((dq, dk, dv), (me, other, other), shares, strict=True):
                total[who] += share
        return tuple(jnp.concatenate(x, axis=1)[:, place] for x in (outs, dq, dk, dv))

    q, k, v, g = arrays()
    assert_close(ring(q, k, v, g), oracle(Mask(window=window), q, k, v, g, soft_cap))


def test_part_without_a_visible_key():
    """Whole blocks of hidden keys: the kernel's 0 / 0 does not come out."""
    q, k, v, g = (x[:1] for x in arrays())
    settings = dict(relation=Relation(offset=-LENGTH), block_sizes=SMALL, interpret=True)

    @jax.jit
    def both(q, k, v, g):
        out, lse = splash_forward(q, k, v, **settings)
        return out, lse, splash_backward(q, k, v, lse, jnp.zeros_like(lse), g, **settings)

    out, lse, gradients = both(q, k, v, g)
    assert not out.any() and (lse == -jnp.inf).all()
    assert not any(gradient.any() for gradient in gradients)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from lcl.attention import layouts
from lcl.attention.mask import Mask
from lcl.attention.splash import BlockSizes, splash_sharded_queries
from tests.attention.splash_test import SEGMENTS, arrays, assert_close, oracle, whole

mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
cut = P(None, "context")
length = SEGMENTS.shape[1]
for layout, mask in (("zigzag", Mask()), ("striped", Mask(window=50))):
    order = layouts.permutation(layout, length, 2)
    place = layouts.inverse(layout, length, 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    def attention(q, k, v, documents):
        gathered = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, documents))
        k, v, all_documents = (x[:, place] for x in gathered)
        return splash_sharded_queries(
            q, k, v, mask=mask, rows_CT=order.reshape(2, -1), axis="context",
            query_segment_ids_BT=documents, key_segment_ids_BS=all_documents,
            block_sizes=BlockSizes(query=128, key=128), interpret=True,
        )

    def kernel(q, k, v):
        laid_out = (jnp.asarray(x)[:, order] for x in (q, k, v, SEGMENTS))
        return attention(*laid_out)[:, place]

    q, k, v, g = arrays()
    assert_close(jax.jit(partial(whole, kernel))(q, k, v, g), oracle(mask, q, k, v, g))
print("ok")
"""


def test_own_queries_over_gathered_keys(run_python):
    """Inside shard_map over two devices, rows in a balanced order."""
    assert run_python(SHARDED, devices=2).strip().endswith("ok")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(window=9),
        Mask(prefix_length=11),
        Mask(causal=False, window=5),
        Relation(offset=-1),
        Relation(offset=7, window=4),
        Relation(offset=-40),
    ],
)
def test_tables_visit_every_visible_block(mask, layout):
    """Against the dense mask; in order exactly, permuted at least, each once and in order."""
    length, block, context = 32, 4, 2
    rows_CT = layouts.permutation(layout, length, context).reshape(context, -1)
    dense = np.asarray(mask.visible(rows_CT.reshape(-1, 1), np.arange(length)[None]))
    blocks = dense.reshape(context, -1, block, length // block, block).any(axis=(2, 4))
    rule, rows = Rule.of(mask), QueryRows(rows_CT)

    def visited(block_1AB, run_1AB, shape, by_column):
        seen = np.zeros(shape, int)
        numbers, run = block_1AB[0], run_1AB[0]
        for a, b in np.ndindex(numbers.shape):
            where = (numbers[a, b], b) if by_column else (a, numbers[a, b])
            seen[where] += run[a, b]  # also refuses a block number out of range
        return seen

    forward = forward_table(rule, rows, length, block, block)
    packed = backward_table(rule, rows, length, block, block, False)
    in_place = backward_table(rule, rows, length, block, block, True)
    for table, by_column in ((forward, False), (packed, True), (in_place, True)):
        for shard in range(context):
            got = visited(table.block[shard], table.run[shard], blocks[shard].shape, by_column)
            assert got.max(initial=0) <= 1
            assert (got >= blocks[shard]).all()
            if layout != "striped":
                np.testing.assert_array_equal(got, blocks[shard])
    assert in_place.run.shape[2] == length // context // block
    assert (in_place.block[in_place.run == 1] == np.nonzero(in_place.run)[2]).all()


def test_tables_are_as_narrow_as_a_window():
    rows = QueryRows(np.arange(64 * 1024)[None])
    table = forward_table(Rule.of(Mask(window=1024)), rows, 64 * 1024, 512, 512)
    assert table.block.shape == (1, 1, 128, 3)
    assert table.block.dtype == np.int8


def test_flops_follow_the_visited_blocks():
    count = partial(splash_flops, num_heads=4, head_dim=64, block_sizes=SMALL)
    full, backward = count(Mask(causal=False), 1024, 1024)
    assert (full, backward) == (4 * 1024 * 1024 * 64 * 4, 14 * 1024 * 1024 * 64 * 4)
    assert count(Mask(), 1024, 1024)[0] == full * 36 // 64  # 8 x 8 blocks, lower triangle
    assert count(Relation(offset=-1024), 1024, 1024) == (0, 0)
    assert count(Mask(window=128), 1024, 1024)[0] == full * 15 // 64


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(mask=Mask(explicit=np.eye(256))), "explicit mask: use impl='reference'"),
        (dict(query_length=200), "200 queries .* multiple of 128"),
        (dict(num_kv_heads=3), "8 query heads are no multiple of 3 key heads"),
        (dict(dtype="float64"), "not float64"),
        (dict(block_sizes=BlockSizes(key=512)), "key=512 does not divide 256"),
        (dict(block_sizes=BlockSizes(dq_query=384)), "dq_query=384 does not divide 256"),
        (dict(mask=Mask(prefix_length=3), ring=True), "prefix_length=3 .* impl='all_gather'"),
        (dict(mask=Mask(window=3), ring=True, layout="zigzag"), "window=3 .*='contiguous'"),
        (dict(ring=True, layout="zigzag", query_length=128), "64 keys .* multiple of 128"),
        (dict(query_length=1 << 20), "scalar memory"),
    ],
)
def test_obstacles_name_value_and_mend(settings, says):
    call = dict(mask=Mask(), query_length=256, num_heads=8, num_kv_heads=2) | settings
    obstacle = splash_obstacle(call.pop("mask"), **call)
    assert obstacle is not None and "\n" not in obstacle
    with pytest.raises(ValueError, match=says):
        raise ValueError(obstacle)


def test_no_obstacle():
    for mask in (Mask(), Mask(window=3), Mask(causal=False), Mask(prefix_length=9)):
        assert splash_obstacle(mask, query_length=65536, num_heads=8, num_kv_heads=2) is None
    zigzag = dict(query_length=256, num_heads=8, num_kv_heads=2, ring=True, layout="zigzag")
    assert splash_obstacle(Mask(), **zigzag) is None


def test_refuses_what_it_cannot_serve():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="splash.*explicit mask"):
        splash(q, k, v, mask=Mask(explicit=np.eye(LENGTH)), interpret=True)
    with pytest.raises(ValueError, match="256 queries and 128 keys"):
        splash(q, k[:, :128], v[:, :128], mask=Mask(), interpret=True)
    with pytest.raises(ValueError, match="both or neither"):
        splash_forward(
            q, k, v, relation=Relation(), query_segments_BT=jnp.asarray(SEGMENTS), interpret=True
        )
    with pytest.raises(ValueError, match="query=100.*use 128"):
        BlockSizes(query=100)
    with pytest.raises(ValueError, match="dq_query=128.*no dq kernel"):
        BlockSizes(dq_query=128, fused_backward=True)


def test_a_jax_that_moved_something_is_named(monkeypatch):
    splash_jax.splash_names()  # this JAX is one that we know
    for wanted, says in (
        ({"_gone": "q"}, "_gone is gone"),
        ({"SegmentIds": "q kv other"}, "SegmentIds no longer takes other"),
        ({"SegmentIds": "q"}, "SegmentIds now needs kv"),
    ):
        monkeypatch.setattr(splash_jax, "_ARGUMENTS", wanted)
        splash_jax.splash_names.cache_clear()
        with pytest.raises(ImportError, match=f"{says}.*impl='blockwise'"):
            splash_jax.splash_names()
    monkeypatch.undo()
    splash_jax.splash_names.cache_clear()
    splash_jax.splash_names()
