"""Offloading compiled for a TPU: the residual stream waits on the host, not on the device."""

from __future__ import annotations

import importlib.util
import json

import pytest

from lcl.models.remat import OFFLOADED, REMAT_POLICIES, TAGS

COMPILE = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from lcl.models import Decoder, DecoderConfig
from lcl.parallel import MeshConfig, rules
from lcl.programs import abstract_state, on_mesh
import optax

mesh = MeshConfig(data=4).build(topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2").devices)
config = DecoderConfig(
    vocab_size=128, num_layers=3, embed_dim=128, mlp_dim=256, num_heads=2, attention="reference",
    dtype="bfloat16", residual_dtype="bfloat16",
)
params = abstract_state(config, optax.identity(), mesh).params
tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=rules.batch_sharding(mesh))
found = {}
for remat in ("full", "offload_residual"):
    model = Decoder(dataclasses.replace(config, remat=remat))

    def loss_fn(params, tokens, model=model):
        hidden = model.apply({"params": params}, tokens, method="hidden")
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    with on_mesh(mesh):
        compiled = jax.jit(jax.grad(loss_fn)).lower(params, tokens).compile()
    found[remat] = compiled.memory_analysis().host_temp_size_in_bytes
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: lcl[tpu]")
def test_the_residual_stream_of_every_layer_waits_on_the_host_of_a_tpu(run_python):
    env = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    found = json.loads(run_python(COMPILE, env=env).splitlines()[-1])
    rows, length, embed_dim, num_layers = 2, 256, 128, 3  # of one device
    assert found == {"full": 0, "offload_residual": num_layers * rows * length * embed_dim * 2}


def test_policies_name_tags_that_exist_and_none_twice():
    for name, kept in REMAT_POLICIES.items():
        offloaded = OFFLOADED.get(name, ())
        assert set(kept or ()) | set(offloaded) <= set(TAGS)
        assert not set(kept or ()) & set(offloaded)
