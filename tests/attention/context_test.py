"""Attention across devices: static cases against dense masks, joining, and the settings' pairs."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lcl.attention import Mask, attend, layouts
from lcl.attention.all_gather import as_laid_out, in_row_order
from lcl.attention.context_plan import ContextPlan
from lcl.attention.ring import merge
from lcl.attention.ring_cases import ring_cases
from tests.attention import context_matrix


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 9, 17, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_cases_of_a_ring_are_the_dense_mask(layout, context, window, causal):
    """For every pair of devices, what the case lets through is what the mask does; no step more."""
    local = 8
    mask = Mask(causal=causal, window=window)
    masked = causal or window is not None
    striped = layout == "striped" and window is not None and not causal
    if context > 1 and (striped or (layout == "zigzag" and masked)):
        with pytest.raises(ValueError, match=f"window={window}"):
            ring_cases(mask, layout, local, context)
        return
    cases = ring_cases(mask, layout, local, context)
    order = layouts.permutation(layout, local * context, context).reshape(context, local)
    place, furthest = np.arange(local), 0
    for queries, keys in itertools.product(range(context), repeat=2):
        case = cases.own if queries == keys else cases.distinct[cases.which[queries, keys]]
        got = np.zeros((local, local), bool)
        if case is not None:
            got = case.visible(place[:, None], place[None, :])
        want = mask.visible(order[queries][:, None], order[keys][None, :])
        np.testing.assert_array_equal(got, want, f"{layout} {queries} {keys} {case}")
        if want.any():
            furthest = max(furthest, (queries - keys) % context)
    assert cases.num_steps == furthest
    assert len(cases.distinct) <= 5  # a kernel each: not one for every pair of devices


def test_joined_parts_are_the_whole_and_nothing_is_nothing():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6, 2))

    def part(keys):
        p = np.exp(scores[:, keys])
        return jnp.asarray((p[..., None] * values[:, keys]).sum(1) / p.sum(1)[:, None]), jnp.log(
            p.sum(1)
        )

    for a, b in zip(merge(part(slice(2)), part(slice(2, 6))), part(slice(6)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    nothing = (jnp.zeros((3, 2)), jnp.full(3, -jnp.inf))
    for a, b in zip(merge(nothing, part(slice(6))), part(slice(6)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    out, lse = merge(nothing, nothing)
    assert (out == 0).all() and (lse == -jnp.inf).all()


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("context", [1, 2, 4])
def test_rows_go_back_into_their_order(layout, context):
    plan = ContextPlan(context=context, mask=Mask(), layout=layout)
    row = jnp.arange(2 * 24 * 3).reshape(2, 24, 3)
    laid_out = row[:, layouts.permutation(layout, 24, context)]
    np.testing.assert_array_equal(in_row_order(laid_out, plan), row)
    np.testing.assert_array_equal(as_laid_out(row, plan), laid_out)


def test_the_pairs_hold_every_pair_of_settings():
    chosen = context_matrix.pairs()
    for i, j in itertools.combinations(range(len(context_matrix.AXES)), 2):
        want = set(itertools.product(context_matrix.AXES[i], context_matrix.AXES[j]))
        assert {(x[i], x[j]) for x in chosen} == want
    assert len(chosen) < 20


def test_every_pair_of_settings_equals_dense_attention(run_python):
    """In a process of 8 devices; the whole matrix is a command, see context_matrix.py."""
    code = "from tests.attention.context_matrix import main; main(['--pairs'])"
    out = run_python(code, devices=8)
    assert "random documents and orders: ok" in out and "kinds of documents" in out


RING = """
import jax, numpy as np
from tests.attention.context_matrix import arrays, documents, forward_and_gradients, make_mesh
from lcl.attention import Mask, attend
from jax.sharding import PartitionSpec as P

length, context = 128, 8
q, k, v, g = arrays(length, 8, 2, 8)
segment_ids = documents(length, context)
q, k, v, g = (x.astype(jax.numpy.bfloat16) for x in (q, k, v, g))
with jax.set_mesh(mesh := make_mesh(1, context)):
    program = jax.jit(lambda *x: forward_and_gradients(*x, impl="ring"))
    shard = jax.NamedSharding(mesh, P(None, "context"))
    args = [jax.device_put(x, shard) for x in (q, k, v, g, segment_ids)]
    jaxpr = str(jax.make_jaxpr(program)(*args))
    sent = [x for x in jaxpr.splitlines() if "= ppermute" in x]
    # Forward: k, v, row index, segments before the loop and in it. Backward: the same and dk, dv;
    # these once more at the end and in the last step. However many devices there are.
    keys, sums = [x for x in sent if "bf16" in x], [x for x in sent if "f32" in x]
    assert (len(keys), len(sums)) == (8, 6), sent
    compiled = program.lower(*args).compile()
    text = compiled.as_text()
    for name in ("all-gather(", "all-reduce(", "all-to-all("):
        assert name not in text, [x for x in text.splitlines() if name in x]

    # Inside a shard_map that has taken the axis, the same arrays are one device's.
    specs = (P(None, "context"),) * 4
    inner = jax.shard_map(
        lambda q, k, v, s: attend(q, k, v, segment_ids_BT=s, impl="ring"),
        mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(inner)(q, k, v, segment_ids), compiled(*args)[0])
    try:
        jax.shard_map(
            lambda q, k, v: attend(q, k, v, impl="blockwise"),
            mesh=mesh, in_specs=specs[:3], out_specs=specs[0], check_vma=False,
        )(q, k, v)
    except ValueError as error:
        assert "would see a part of each row" in str(error), error
    else:
        raise AssertionError("blockwise ran on part of a row")
print("ring ok")
"""


def test_a_ring_sends_keys_once_a_step_and_gathers_nothing(run_python):
    assert "ring ok" in run_python(RING, devices=8)


def test_a_ring_of_one_device_needs_no_mesh():
    q, k, v, _ = (jnp.asarray(x) for x in context_matrix.arrays(24, 4, 2, 8))
    want = attend(q, k, v, impl="reference")
    for impl in ("ring", "all_gather", "ulysses"):
        np.testing.assert_allclose(attend(q, k, v, impl=impl), want, atol=2e-6)
