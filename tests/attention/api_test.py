"""The door: choices, errors, and meshes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lcl.attention import Mask, attend
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
        ({"impl": "blockwise", "row_index_BT": jnp.arange(20)[None]}, "row_index"),
        ({"impl": "blockwise", "mask": Mask(explicit=np.tri(20))}, "explicit"),
        ({"segment_ids_BT": jnp.ones((1, 19), jnp.int32)}, "segment_ids"),
        ({"v_BSKH": jnp.ones((1, 20, 1, 16))}, r"\(1, 20, 1, 16\)"),
        ({"k_BSKH": jnp.ones((1, 20, 3, 16)), "v_BSKH": jnp.ones((1, 20, 3, 16))}, "multiple of 3"),
    ],
)
def test_bad_calls_are_one_line_errors(change, words):
    q, k, v, _ = inputs(1, 20, 4, 2)
    with pytest.raises(ValueError, match=words) as error:
        attend(**{"q_BTNH": q, "k_BSKH": k, "v_BSKH": v, **change})
    assert "\n" not in str(error.value)


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

def refused(sizes, batch, words):
    q, k, v, _ = inputs(batch, 16, 4, 4)
    with jax.set_mesh(make_mesh(sizes)):
        try:
            attend(q, k, v, impl="blockwise")
        except ValueError as error:
            assert words in str(error) and chr(10) not in str(error), error
        else:
            raise AssertionError(f"blockwise ran on {sizes}")
        attend(q, k, v)

refused((1, 1, 8, 1), 8, "context=8")
refused((2, 4, 1, 1), 4, "batch of 4")
refused((1, 1, 1, 8), 8, "4 heads")
print("meshes ok")
"""


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
