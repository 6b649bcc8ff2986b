"""Digests: bit for bit, place-sensitive, the same on every mesh, the same as NumPy's."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from lcl.checkpoints import state_digest
from lcl.checkpoints.digest import numpy_digest
from lcl.checkpoints.leaves import describe, named_leaves, nest, unnest

DTYPES = ["float32", "int32", "uint32", "float16", "int8", "uint8", "bool", ml_dtypes.bfloat16]


def digest(array) -> int:
    return state_digest({"x": array})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_agrees_with_numpy(dtype):
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (5,), (3, 4), (2, 3, 4)]:
        array = (rng.normal(size=shape) * 50).astype(dtype)
        array = np.asarray(array, dtype)
        assert digest(jnp.asarray(array)) == digest(array) == numpy_digest(array)


def test_known_value():
    """A change of the definition would make every stored checkpoint look corrupted."""
    assert numpy_digest(np.arange(6, dtype=np.float32).reshape(2, 3)) == 81683098
    assert digest(jnp.arange(6, dtype=jnp.float32).reshape(2, 3)) == 81683098


@hypothesis.given(hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=5)), st.data())
def test_one_flipped_bit_always_shows(array, data):
    index = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    flipped = array.copy()
    flipped[index] ^= np.uint32(1) << np.uint32(data.draw(st.integers(0, 31)))
    assert numpy_digest(flipped) != numpy_digest(array)


def test_swapped_values_show():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped = [array[::-1], array[:, ::-1], array.reshape(4, 3).T, np.roll(array, 1, 1)]
    digests = {digest(jnp.asarray(a)) for a in [array, *swapped]}
    assert len(digests) == 5
    zeros = [np.zeros(shape, np.float32) for shape in [(4,), (2, 2), (1, 4)]]
    assert len({digest(z) for z in zeros}) == 3


def test_bits_and_not_values():
    nan, other = np.uint32([0x7FC00000]).view("f4"), np.uint32([0x7FC00001]).view("f4")
    pairs = [(np.float32([0.0]), np.float32([-0.0])), (nan, other)]
    for a, b in pairs:
        assert digest(jnp.asarray(a)) != digest(jnp.asarray(b))
    assert digest(nan) == digest(nan.copy())


def test_keys_have_a_digest_and_wide_numbers_are_refused():
    keys = [digest(jax.random.key(seed)) for seed in (0, 1)]
    assert keys[0] != keys[1]
    with pytest.raises(ValueError, match=r"int64: keep states to 32 bits, such as .*jnp.int32"):
        digest(np.arange(3))


def test_no_more_than_a_few_leaves_are_under_way(monkeypatch):
    """Else a state of many leaves can stand still on several CPU devices (`SMALL_PROGRAMS`)."""
    from lcl.checkpoints import digest as module
    from lcl.parallel.run_ahead import SMALL_PROGRAMS

    waited = []

    class Under:
        def __init__(self, leaf):
            self.value = np.uint32(leaf)

        def block_until_ready(self):
            waited.append(int(self.value))

        def __array__(self, *_, **__):
            return np.asarray(self.value)

    started = []

    def start(leaf):
        assert len(started) - len(waited) <= SMALL_PROGRAMS
        started.append(leaf)
        return Under(leaf)

    monkeypatch.setattr(module, "_array_digest", lambda: start)
    monkeypatch.setattr(jax, "device_get", lambda some: [one.value for one in some])
    state = {f"w{i:02d}": np.int32(i) for i in range(40)}
    assert state_digest(state) == {f"w{i:02d}": i for i in range(40)}
    assert waited == list(range(40 - SMALL_PROGRAMS))


def test_one_program_for_one_shape():
    """A state of many layers costs a compilation a distinct shape, not a leaf; again: none."""
    from lcl.checkpoints.digest import _array_digest

    state = {f"w{i}": jnp.full((7, 11), i, jnp.float32) for i in range(8)}
    before = _array_digest()._cache_size()
    first = state_digest(state)
    assert _array_digest()._cache_size() == before + 1
    assert state_digest(state) == first
    assert _array_digest()._cache_size() == before + 1


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lcl.checkpoints import state_digest
from lcl.parallel import MeshConfig
x = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)
want = state_digest({"x": jnp.asarray(x)})
for sizes in [dict(data=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)]:
    mesh = MeshConfig(**sizes).build()
    for spec in [(), ("fsdp", "tensor"), (("data", "fsdp"), None, "tensor"), (None, "tensor")]:
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert state_digest({"x": sharded}) == want, (sizes, spec)
print("ok")
"""


def test_the_same_on_every_mesh(run_python):
    assert run_python(EIGHT_DEVICES, devices=8) == "ok\n"


def test_names_of_leaves():
    import optax

    state = {"params": {"w": jnp.ones((2, 3))}}
    state["opt"] = optax.adam(1e-3).init(state["params"])
    assert list(named_leaves(state)) == ["opt/0/count", "opt/0/mu/w", "opt/0/nu/w", "params/w"]
    assert describe(state["params"]["w"]) == "float32[2,3]"
    nested = nest(state)
    assert set(nested["opt"]["0"]) == {"count", "mu", "nu"}
    back = unnest(nested, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back["opt"][0].mu["w"] is state["opt"][0].mu["w"]
    with pytest.raises(ValueError, match="two leaves of the state are called 'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})
