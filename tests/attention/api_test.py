"""The door: choices, errors, head masks, other keys, and meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.attention import Mask, attend, check_attention
from tests.attention.helpers import inputs, segments


def test_auto_takes_whatever_comes():
    q, k, v, _ = inputs(1, 20, 2, 1)
    row_index = jnp.asarray(np.random.default_rng(0).permutation(20)[None])
    for kwargs in (
        {},
        {"segment_ids_BT": segments("many", 1, 20)},
        {"row_index_BT": row_index},
        {"mask": Mask(explicit=np.tri(20, dtype=bool))},
    ):
        got = attend(q, k, v, **kwargs)
        np.testing.assert_allclose(got, attend(q, k, v, impl="reference", **kwargs), atol=2e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"impl": "flash"}, "flash"),
        ({"impl": "blockwise", "mask": Mask(explicit=np.tri(20))}, "explicit"),
        ({"impl": "splash"}, "TPU kernel, and this is a cpu"),
        ({"impl": "splash", "interpret": True}, "20 queries on a device are no multiple of 128"),
        ({"layout": "snake"}, "layout='snake'"),
        ({"segment_ids_BT": jnp.ones((1, 19), jnp.int32)}, "segment_ids"),
        ({"head_mask_N": jnp.ones(3)}, "head_mask"),
        ({"v_BSKH": jnp.ones((1, 20, 1, 16))}, r"\(1, 20, 1, 16\)"),
        ({"k_BSKH": jnp.ones((1, 9, 2, 16)), "v_BSKH": jnp.ones((1, 9, 2, 16))}, "9 keys for 20"),
        ({"k_BSKH": jnp.ones((1, 20, 3, 16)), "v_BSKH": jnp.ones((1, 20, 3, 16))}, "multiple of 3"),
        ({"impl": "ring", "key_row_index_BS": jnp.arange(20)[None]}, "keys come from elsewhere"),
        (
            {"key_row_index_BS": jnp.arange(20)[None], "segment_ids_BT": segments("one", 1, 20)},
            "one side only",
        ),
    ],
)
def test_bad_calls_are_one_line_errors(change, words):
    q, k, v, _ = inputs(1, 20, 4, 2)
    with pytest.raises(ValueError, match=words) as error:
        attend(**{"q_BTNH": q, "k_BSKH": k, "v_BSKH": v, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"impl": "flash"}, "flash"),
        ({"context": 3}, "context=3 does not divide a row of 1024 tokens"),
        ({"row_length": 24, "layout": "zigzag", "context": 8}, "2 x context = 16 equal chunks"),
        ({"impl": "ulysses", "context": 8}, "4 heads on a device do not split over context=8"),
        ({"impl": "ulysses", "context": 4, "tensor": 2}, "2 heads on a device"),
        ({"impl": "blockwise", "tensor": 8}, "4 heads do not split over tensor=8"),
        ({"impl": "splash"}, "use impl='blockwise'"),
        ({"impl": "splash", "context": 4, "platform": "tpu"}, "context=4: use impl='ring'"),
        ({"impl": "ring", "context": 16, "platform": "tpu"}, "64 queries on a device"),
        (
            {"platform": "tpu", "context": 4, "layout": "zigzag", "mask": Mask(window=9)},
            "window=9",
        ),
        ({"row_length": 10000, "mask": Mask(explicit=np.eye(2))}, "10000 tokens"),
    ],
)
def test_a_config_that_cannot_run_is_refused_when_it_is_built(change, words):
    fine = dict(
        impl="auto",
        mask=Mask(),
        layout="contiguous",
        row_length=1024,
        context=1,
        tensor=1,
        num_heads=4,
        num_kv_heads=2,
    )
    check_attention(**fine)
    with pytest.raises(ValueError, match=words) as error:
        check_attention(**{**fine, **change})
    assert "\n" not in str(error.value)


def test_a_head_mask_multiplies_each_head():
    q, k, v, _ = inputs(1, 20, 4, 2)
    head_mask = jnp.array([1.0, 0.0, 0.5, 1.0])

    def total(head_mask):
        return attend(q, k, v, head_mask_N=head_mask).sum()

    plain = attend(q, k, v)
    np.testing.assert_array_equal(
        attend(q, k, v, head_mask_N=head_mask), plain * head_mask[:, None]
    )
    np.testing.assert_allclose(jax.grad(total)(head_mask), plain.sum((0, 1, 3)), rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_keys_from_elsewhere(impl):
    """Queries are the last 8 rows, keys the whole row: as in decoding, or a chunk of a long row."""
    q, k, v, _ = inputs(2, 20, 4, 2)
    segment_ids = segments("many", 2, 20)
    want = attend(q, k, v, segment_ids_BT=segment_ids, impl="reference")
    index = jnp.broadcast_to(jnp.arange(20), (2, 20))
    got = attend(
        q[:, 12:],
        k,
        v,
        segment_ids_BT=segment_ids[:, 12:],
        row_index_BT=index[:, 12:],
        key_segment_ids_BS=segment_ids,
        key_row_index_BS=index,
        impl=impl,
    )
    np.testing.assert_allclose(got, want[:, 12:], atol=2e-6)


MESHES = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.attention.helpers import forward_and_gradients, inputs, segments
from lcl.attention import attend

assert len(jax.devices()) == 8

def make_mesh(sizes):
    names = ("data", "fsdp", "context", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)

MESHES = {
    2: [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)],
    1: [(1, 2, 1, 4), (1, 2, 2, 2)],  # one key head cannot be shared out; the context axis is split
}
for num_kv_heads, meshes in MESHES.items():
    q, k, v, g = inputs(8, 150, 4, num_kv_heads, head_dim=8)
    segment_ids = segments("tail", 8, 150)
    want = forward_and_gradients(q, k, v, g, segment_ids, impl="blockwise")
    for sizes in meshes:
        with jax.set_mesh(mesh := make_mesh(sizes)):
            rows = NamedSharding(mesh, P(("data", "fsdp")))
            args = [jax.device_put(x, rows) for x in (q, k, v, g, segment_ids)]
            impl = "auto" if sizes[2] > 1 else "blockwise"
            for a, b in zip(forward_and_gradients(*args, impl=impl), want, strict=True):
                np.testing.assert_allclose(np.asarray(a), b, atol=5e-6)
            if sizes == (8, 1, 1, 1):  # rows are independent: devices have nothing to say
                text = forward_and_gradients.lower(*args, impl=impl).compile().as_text()
                for name in ("all-gather(", "all-reduce("):
                    assert name not in text, [x for x in text.splitlines() if name in x]

def refused(sizes, batch, words, **kwargs):
    q, k, v, _ = inputs(batch, 16, 4, 4)
    with jax.set_mesh(make_mesh(sizes)):
        try:
            attend(q, k, v, **kwargs)
        except ValueError as error:
            assert words in str(error) and chr(10) not in str(error), error
        else:
            raise AssertionError(f"{kwargs} ran on {sizes}")
        attend(q, k, v)

refused((2, 4, 1, 1), 4, "batch of 4", impl="blockwise")
refused((1, 1, 1, 8), 8, "4 heads", impl="blockwise")
refused((1, 1, 8, 1), 8, "4 heads on a device", impl="ulysses")
refused((1, 1, 8, 1), 8, "context=8: use", impl="splash", interpret=True)
print("meshes ok")
"""


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
