"""The one list of rules: names to mesh axes, shardings of a whole state, batches on devices."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lcl.parallel import (
    AXES,
    LOGICAL_AXIS_RULES,
    MeshConfig,
    abstract_state,
    check_batch_shape,
    check_model_splits,
    global_batch,
    mesh_spec,
    process_rows,
    put_batch,
    replace_rules,
    sharding_dump,
    state_shardings,
    unbox,
)
from lcl.parallel.rules import dumps


class Layer(nn.Module):
    """A scanned SwiGLU-like layer with named dims."""

    dim: int = 8
    mlp: int = 16

    @nn.compact
    def __call__(self, x, _):
        names = nn.with_logical_partitioning
        up = self.param(
            "up", names(nn.initializers.normal(), ("embed", "mlp")), (self.dim, self.mlp)
        )
        down = self.param(
            "down", names(nn.initializers.normal(), ("mlp", "embed")), (self.mlp, self.dim)
        )
        scale = self.param("scale", names(nn.initializers.ones, ("norm",)), (self.dim,))
        return x + jax.nn.silu(x * scale @ up) @ down, None


def init_state(layer=Layer()):  # noqa: B008
    stack = nn.scan(
        type(layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )  # fmt: skip
    params = stack(layer.dim, layer.mlp).init(jax.random.key(0), jnp.ones((2, layer.dim)), None)
    params = params["params"]
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {"step": jnp.int32(0), "params": params, "opt_state": chain.init(params)}


def mesh_of(**sizes):
    """A mesh without devices: what may be asked of shapes needs none."""
    return AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Auto,) * 4)


def test_every_rule_names_mesh_axes_and_every_name_has_one_rule():
    names = [name for name, _ in LOGICAL_AXIS_RULES]
    assert len(names) == len(set(names))
    for _, axes in LOGICAL_AXIS_RULES:
        assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(AXES)


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("vocab", "embed"), PartitionSpec("tensor", ("fsdp", "context"))),
        (
            ("layers", "embed", "heads", "head_dim"),
            PartitionSpec(None, ("fsdp", "context"), "tensor", None),
        ),
        (
            ("layers", "embed", "kv_heads", "head_dim"),
            PartitionSpec(None, ("fsdp", "context"), "tensor", None),
        ),
        (("mlp", "embed"), PartitionSpec("tensor", ("fsdp", "context"))),
        (("norm",), PartitionSpec(None)),
        ((None, "mlp"), PartitionSpec(None, "tensor")),
        (("batch", "sequence"), PartitionSpec(("data", "fsdp"), "context")),
        (
            ("batch", "sequence", "activation_embed"),
            PartitionSpec(("data", "fsdp"), "context", None),
        ),
        (
            ("batch", "sequence", "activation_heads", None),
            PartitionSpec(("data", "fsdp"), "context", "tensor", None),
        ),
    ],
)
def test_a_sharding_can_be_read_off_the_list(names, spec):
    assert mesh_spec(names) == spec
    # flax, which places the activations, reads the same list the same way
    assert nn.logical_to_mesh_axes(names, LOGICAL_AXIS_RULES) == spec


def test_a_name_without_a_rule_names_the_nearest():
    with pytest.raises(ValueError, match=r"'embedd' is in no rule \(nearest: 'embed'\)"):
        mesh_spec(("embedd",))


def test_two_dims_on_one_mesh_axis_are_refused_rather_than_dropped():
    """flax would keep the first and silently leave the second whole."""
    with pytest.raises(ValueError, match=r"'embed' and 'embed' of one array both want .* 'fsdp'"):
        mesh_spec(("embed", "embed"))
    with pytest.raises(ValueError, match=r"'batch' and 'embed' .*'fsdp'"):
        mesh_spec(("batch", "sequence", "embed"))


def test_rules_can_be_replaced_by_name_only():
    rules = replace_rules(embed=None, layers="fsdp")
    assert mesh_spec(("layers", "embed"), rules) == PartitionSpec("fsdp", None)
    with pytest.raises(ValueError, match="no logical axis 'embd' to replace"):
        replace_rules(embd=None)


def test_moments_lie_where_their_parameters_lie(golden):
    """Golden: the shardings of a whole state, boxes flowing through optax's init."""
    boxed = jax.eval_shape(init_state)
    dump = sharding_dump(boxed)
    for moment in ("mu", "nu"):
        for leaf in ("up", "down", "scale"):
            assert dump[f"opt_state/1/0/{moment}/{leaf}"] == dump[f"params/{leaf}"]
    assert dump["params/up"] == {"shape": [3, 8, 16], "spec": [None, ["fsdp", "context"], "tensor"]}
    assert dump["step"] == {"shape": [], "spec": []}
    text = dumps(dump)
    assert json.loads(text) == dump
    golden("parallel/tiny_state_shardings.json", text)


def test_the_abstract_state_is_the_unboxed_state_with_shardings():
    mesh = MeshConfig().build(jax.devices()[:1])
    boxed = jax.eval_shape(init_state)
    abstract = abstract_state(boxed, mesh)
    real = jax.jit(lambda: unbox(init_state()), out_shardings=state_shardings(boxed, mesh))()
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for want, have in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (want.shape, want.dtype, want.sharding) == (have.shape, have.dtype, have.sharding)


def test_a_dim_that_does_not_split_is_refused_by_its_path():
    boxed = jax.eval_shape(lambda: init_state(Layer(dim=6)))
    message = (
        r"opt_state/1/0/mu/down: embed of 6 does not split over mesh axis fsdp x context = 4: "
        r"choose a degree that divides 6"
    )
    with pytest.raises(ValueError, match=message):
        state_shardings(boxed, mesh_of(fsdp=4))


def test_a_box_with_too_few_names_is_refused():
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2, 3), jnp.float32), names=("embed",))
    with pytest.raises(ValueError, match=r"w has shape \(2, 3\) but 1 logical axes"):
        state_shardings({"w": box}, mesh_of())


def test_kv_heads_that_tensor_can_not_split_are_refused_at_the_door():
    """Never replicated silently: a chip's query heads must sit beside their own keys."""
    config = types.SimpleNamespace(
        num_heads=8, num_kv_heads=2, mlp_dim=64, vocab_size=260, embed_dim=64
    )
    check_model_splits(config, mesh_of(tensor=2, fsdp=4))
    with pytest.raises(ValueError, match=r"num_kv_heads = 2 .*tensor = 4: .*to one of 1, 2, or"):
        check_model_splits(config, mesh_of(tensor=4))
    with pytest.raises(ValueError, match=r"embed_dim = 64 does not split over fsdp = 3"):
        check_model_splits(config, mesh_of(fsdp=3))
    with pytest.raises(ValueError, match=r"embed_dim = 64 .* over fsdp 8 x context 16 = 128: .*64"):
        check_model_splits(config, mesh_of(fsdp=8, context=16))


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (6, 8, "batch of 6 rows does not split over data 2 x fsdp 2 = 4 devices: use 4 or 8 rows"),
        (3, 8, "use 4 rows"),
        (4, 9, "rows of 9 tokens do not split over context 2: use 8 or 10 tokens"),
    ],
)
def test_batches_that_do_not_split_are_refused(batch, length, message):
    mesh = mesh_of(data=2, fsdp=2, context=2)
    check_batch_shape(mesh, 4, 8)
    with pytest.raises(ValueError, match=message):
        check_batch_shape(mesh, batch, length)


def test_one_process_puts_the_whole_batch_without_an_implicit_transfer():
    mesh = MeshConfig().build(jax.devices()[:1])
    batch = {"tokens": np.arange(12, dtype=np.int32).reshape(3, 4), "row_index": None}
    assert process_rows(mesh, 3) is None
    with jax.transfer_guard("disallow"):
        put = put_batch(batch, mesh)
    assert put["row_index"] is None
    np.testing.assert_array_equal(put["tokens"], batch["tokens"])
    with pytest.raises(ValueError, match="rows without batch_size"):
        put_batch({"tokens": batch["tokens"]}, mesh, rows=np.arange(3))


def test_the_global_batch_asks_the_stream_for_its_step():
    mesh = MeshConfig().build(jax.devices()[:1])
    asked = []

    class Stream:
        def batch_shape(self, t):
            return 2, 4

        def batch(self, t, rows=None):
            asked.append((t, rows))
            return {"tokens": np.full((2, 4), t, np.int32)}

    assert int(global_batch(Stream(), 7, mesh)["tokens"].sum()) == 56
    assert asked == [(7, None)]


EIGHT_DEVICES = """
import jax, numpy as np
from lcl.parallel import MeshConfig, put_batch, process_rows, state_shardings, unbox, abstract_state
from tests.parallel.rules_test import init_state
batch = {"t": np.arange(8 * 16, dtype=np.int32).reshape(8, 16)}
boxed = jax.eval_shape(init_state)
for sizes in [dict(), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2),
              dict(data=1, context=4, tensor=2), dict(data=4, fsdp=2)]:
    mesh = MeshConfig(**sizes).build()
    put = put_batch(batch, mesh)["t"]
    np.testing.assert_array_equal(np.asarray(put), batch["t"])
    rows, tokens = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    assert {s.data.shape for s in put.addressable_shards} == {(8 // rows, 16 // tokens)}
    # by rows, in another order: the same global array
    order = np.random.default_rng(0).permutation(8)
    again = put_batch({"t": batch["t"][order]}, mesh, rows=order, batch_size=8)["t"]
    np.testing.assert_array_equal(np.asarray(again), batch["t"])
    assert again.sharding == put.sharding
    abstract = abstract_state(boxed, mesh)["params"]["up"]
    assert abstract.sharding.shard_shape(abstract.shape) == (
        3, 8 // (mesh.shape["fsdp"] * mesh.shape["context"]), 16 // mesh.shape["tensor"]
    ), (sizes, abstract)
    if sizes != dict(data=2, fsdp=2, tensor=2):
        continue
    state = jax.jit(lambda: unbox(init_state()), out_shardings=state_shardings(boxed, mesh))()
    up = state["params"]["up"]
    assert up.addressable_shards[0].data.shape == (3, 4, 8)
    assert state["opt_state"][1][0].mu["up"].sharding == up.sharding
print("ok")
"""


def test_batches_and_states_lie_as_the_rules_say_on_eight_devices(run_python):
    assert run_python(EIGHT_DEVICES, devices=8) == "ok\n"
