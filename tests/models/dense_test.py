"""The linear layers' matmul: every form, both dtypes, its gradients, and its place on a mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.models.dense import dense_dot, with_gradient_in

FORMS = {
    "matrix": ((2, 7, 16), (16, 24), 1, "BTD,DF->BTF"),
    "to_heads": ((2, 7, 16), (16, 4, 6), 1, "BTD,DNH->BTNH"),
    "from_heads": ((2, 7, 4, 6), (4, 6, 16), 2, "BTNH,NHD->BTD"),
}


def output_and_gradients(x, w, num_contracting, compute_dtype):
    """y and the gradients of sum(sin(y))."""

    def f(x, w):
        y = dense_dot(x, w, num_contracting=num_contracting, compute_dtype=compute_dtype)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(f, (0, 1), has_aux=True)(x, w)
    return y, *gradients


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compute_dtype, bound", [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_forms(form, compute_dtype, bound, jit):
    x_shape, w_shape, num_contracting, spec = FORMS[form]
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in (x_shape, w_shape))
    w *= 0.3
    run = partial(
        output_and_gradients, num_contracting=num_contracting, compute_dtype=compute_dtype
    )
    got = (jax.jit(run) if jit else run)(jnp.array(x), jnp.array(w))
    y, g_terms = np.einsum(spec, x, w), spec.replace("->", ",").split(",")
    g = np.cos(y)
    dx = np.einsum(f"{g_terms[2]},{g_terms[1]}->{g_terms[0]}", g, w)
    dw = np.einsum(f"{g_terms[0]},{g_terms[2]}->{g_terms[1]}", x, g)
    for a, b in zip(got, (y, dx, dw), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


def test_dtypes_follow_the_inputs():
    x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 4))
    y = dense_dot(x, w, compute_dtype="bfloat16", dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    dx, dw = jax.grad(lambda *a: dense_dot(*a, compute_dtype="bfloat16").sum(), (0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_accumulates_in_float32():
    # 1 + 2^-9 is no bfloat16: a bfloat16 result would round the sum to 1.
    x, w = jnp.array([[1.0, 2.0**-9]]), jnp.ones((2, 1))
    assert dense_dot(x, w, compute_dtype="bfloat16")[0, 0] == 1 + 2.0**-9


def test_float32_differentiates_twice_and_forward():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 2))

    def f(w):
        return jnp.sum(dense_dot(x, w) ** 3)

    direction = jnp.ones_like(w)
    _, product = jax.jvp(jax.grad(f), (w,), (direction,))  # Hessian-vector product
    assert np.isfinite(product).all()
    assert product.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_narrow_gradient_is_the_exact_one_rounded_once(form):
    x_shape, w_shape, num_contracting, _ = FORMS[form]
    rng = np.random.default_rng(1)
    x, w = (jnp.array(rng.normal(size=s), jnp.float32) for s in (x_shape, w_shape))

    def gradients(gradient_dtype):
        def f(x, w):
            w = with_gradient_in(w, gradient_dtype)
            y = dense_dot(x, w, num_contracting=num_contracting)
            return jnp.sum(jnp.sin(y))

        return jax.grad(f, (0, 1))(x, w)

    (dx, dw), (dx_narrow, dw_narrow) = gradients("float32"), gradients("bfloat16")
    np.testing.assert_array_equal(dx, dx_narrow)
    assert dw_narrow.dtype == jnp.float32
    np.testing.assert_array_equal(dw.astype(jnp.bfloat16), dw_narrow)
    assert (dw != dw_narrow).any()


def test_with_gradient_in():
    third = jnp.float32(1 / 3)
    for name, want in (("bfloat16", third.astype(jnp.bfloat16)), ("float32", third), (None, third)):
        value, slope = jax.value_and_grad(lambda x, n=name: third * with_gradient_in(x, n))(3.0)
        assert value == third * 3.0
        assert slope == want, name


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_under_vmap_and_remat(compute_dtype):
    x, w = jnp.arange(24.0).reshape(2, 3, 4) / 24, jnp.arange(16.0).reshape(2, 4, 2) / 16

    def one(x, w):
        dot = jax.checkpoint(partial(dense_dot, compute_dtype=compute_dtype))
        return jnp.sum(jnp.sin(dot(x, w)))

    got = jax.vmap(jax.grad(one, 1))(x, w)
    for i in range(2):
        np.testing.assert_allclose(got[i], jax.grad(one, 1)(x[i], w[i]), rtol=1e-6)


def test_lowered_for_cpu_the_transposes_are_made_and_for_tpu_they_are_not():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 4))
    run = jax.jit(partial(output_and_gradients, num_contracting=1, compute_dtype="bfloat16"))
    traced = run.trace(x, w)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert texts["cpu"].count("LayoutConstraint") == 2
    assert texts["tpu"].count("LayoutConstraint") == 0
    for text in texts.values():
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 3
        # bfloat16 in, float32 out.
        assert all("bf16>, tensor" in d and d.rstrip().endswith("xf32>") for d in dots), dots


def test_shapes_that_do_not_fit_are_one_line_errors():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 5\)") as error:
        dense_dot(jnp.ones((2, 3)), jnp.ones((4, 5)))
    assert "\n" not in str(error.value)


MESHES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.models.dense_test import output_and_gradients

x = jax.random.normal(jax.random.key(0), (8, 6, 16))
w = jax.random.normal(jax.random.key(1), (16, 4, 8))
names = ("data", "fsdp", "context", "tensor")
for dtype in ("float32", "bfloat16"):
    run = jax.jit(lambda x, w: output_and_gradients(x, w, 1, dtype))
    want = run(x, w)
    for sizes in ((8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)):
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 4)
        with jax.set_mesh(mesh):
            args = (
                jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))),
                jax.device_put(w, NamedSharding(mesh, P("fsdp", "tensor"))),
            )
            for a, b in zip(run(*args), want, strict=True):
                np.testing.assert_allclose(np.asarray(a), b, atol=1e-5 * np.abs(b).max())
            if sizes[0] == 8:  # no activation is gathered: only gradients of w are summed
                assert "all-gather(" not in run.lower(*args).compile().as_text()
print("meshes ok")
"""


def test_eight_devices_equal_one(run_python):
    assert "meshes ok" in run_python(MESHES, devices=8)
