"""The embedding's lookup: the same rows and the same gradient wherever the table lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lcl.models.lookup import embed_tokens

MESHES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lcl.models.lookup import embed_tokens

keys = jax.random.split(jax.random.key(0), 3)
V, D = 48, 16
table = jax.random.normal(keys[0], (V, D))
tokens = jax.random.randint(keys[1], (8, 24), 0, V)
pull = jax.random.normal(keys[2], (8, 24, D))

@jax.jit
def run(table, tokens, pull):
    def f(table):
        x = embed_tokens(table, tokens, jnp.float32)
        return jnp.sum(x * pull), x
    return jax.grad(f, has_aux=True)(table)

want_gradient, want = jax.tree.map(np.asarray, run(table, tokens, pull))
names = ("data", "fsdp", "context", "tensor")
for sizes in ((1, 1, 8, 1), (2, 1, 4, 1), (1, 4, 2, 1), (2, 2, 1, 2), (1, 2, 2, 2), (4, 1, 1, 2)):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
        place = NamedSharding(mesh, P("tensor", ("fsdp", "context")))
        args = jax.device_put(table, place), *(jax.device_put(x, rows) for x in (tokens, pull))
        compiled = run.lower(*args).compile()
        gradient, x = compiled(*args)
        np.testing.assert_array_equal(x, want, err_msg=str(sizes))
        np.testing.assert_allclose(gradient, want_gradient, rtol=2e-6, atol=2e-6)
        if sizes[1] * sizes[2] == 1:
            continue  # the table is not cut along D
        assert gradient.sharding.is_equivalent_to(place, 2), gradient.sharding
        text = compiled.as_text()
        gathered = set(re.findall(r"(\\w+)\\[[\\d,]*\\]\\S* all-gather\\(", text))
        assert gathered == {"s32"}, (sizes, gathered)  # tokens, never the table or what it gave
        assert len(re.findall(r" all-to-all\\(", text)) == 2, sizes
        if sizes[0] * sizes[3] == 1:
            assert "all-reduce(" not in text, sizes
        wrong = np.array(tokens)
        wrong[3, 5], wrong[7, 23] = V, 47
        x = np.array(run(args[0], jax.device_put(wrong, rows), args[2])[1])
        assert np.isnan(x[3, 5]).all() and np.isnan(x).sum() == D
        np.testing.assert_array_equal(x[7, 23], table[47])

# What the mesh does not divide is looked up all the same.
with jax.set_mesh(jax.make_mesh((1, 2, 2, 2), names, axis_types=(AxisType.Auto,) * 4)):
    gradient, x = run(table, tokens[:3, :5], pull[:3, :5])
np.testing.assert_array_equal(x, want[:3, :5])
print("meshes ok")
"""


def test_a_token_outside_the_vocabulary_gives_nan():
    x = np.asarray(embed_tokens(jnp.eye(3), jnp.array([[0, 3], [2, 1]]), jnp.bfloat16), np.float32)
    assert np.isnan(x[0, 1]).all()
    np.testing.assert_array_equal(x[1], np.eye(3)[[2, 1]])


def test_the_gradient_adds_up_the_tokens_of_a_row():
    tokens = jnp.array([[2, 0, 2, 2]])
    gradient = jax.grad(lambda t: embed_tokens(t, tokens, jnp.float32).sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, [[1, 1], [0, 0], [3, 3], [0, 0]])


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
