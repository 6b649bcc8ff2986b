"""RoPE: frequencies against literals, angles against exact arithmetic, rotations by algebra."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.models.rope import LinearRope, Llama3Rope, Rope, apply_rope, rope_cos_sin

KINDS = [Rope(theta=10_000.0), LinearRope(theta=10_000.0, factor=4.0), Llama3Rope()]


def exact_angle(position: int, inv_freq: float) -> float:
    """position * inv_freq modulo a turn, in rational arithmetic, in [-pi, pi)."""
    turn = Fraction(2 * np.pi)  # the same rounded pi that the code divides by
    angle = (Fraction(position) * Fraction(float(inv_freq))) % turn
    return float(angle - turn if angle >= turn / 2 else angle)


def test_default_frequencies_are_the_formula():
    want = [1.0, 0.1, 0.01, 0.001]
    np.testing.assert_allclose(Rope(theta=10_000.0).inv_freq(8), want, rtol=1e-14)


def test_linear_frequencies_are_divided():
    np.testing.assert_allclose(LinearRope(10_000.0, 4.0).inv_freq(4), [0.25, 0.0025], rtol=1e-14)


def test_llama3_frequencies_are_transformers_literals():
    # LlamaConfig(head_dim=16, rope_type="llama3", theta=500000, factor=8, low 1, high 4, 8192),
    # transformers 5.24: one kept, one between, the rest divided by 8.
    want = [
        1.0000000000e00,
        1.9392275810e-01,
        3.7606030703e-02,
        7.2926650755e-03,
        5.2484602202e-04,
        3.4281023545e-05,
        6.6478696681e-06,
        1.2891731558e-06,
    ]
    np.testing.assert_allclose(Llama3Rope().inv_freq(16), want, rtol=1e-6)


@given(
    position=st.one_of(st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 255, 256, 2**20, 2**24])),
    kind=st.sampled_from(KINDS),
)
def test_angles_are_exact_at_every_position(position, kind):
    cos, sin = rope_cos_sin(kind, 64, jnp.array([[position]], jnp.int32))
    for r, inv_freq in enumerate(kind.inv_freq(64)):
        angle = exact_angle(position, inv_freq)
        # 7.5e-7 from the fixed-point words, as much from float32; above 2^26 also the float64
        # rounding of 2^24 * inv_freq.
        bound = 2e-6 + position * 2.0**-51
        assert abs(float(cos[0, 0, r]) - np.cos(angle)) < bound
        assert abs(float(sin[0, 0, r]) - np.sin(angle)) < bound


def test_the_plain_float32_product_would_not_pass():
    """What the fixed-point words are for: the usual form is off by degrees at a million tokens."""
    inv_freq = Rope().inv_freq(64)
    position = 1_048_575
    plain = np.float32(position) * inv_freq.astype(np.float32)
    exact = np.array([exact_angle(position, f) for f in inv_freq])
    assert np.abs(np.cos(plain) - np.cos(exact)).max() > 1e-3


def rotated(x, position, kind=KINDS[0]):
    cos, sin = rope_cos_sin(kind, x.shape[-1], jnp.full((1, 1), position, jnp.int32))
    return apply_rope(x.reshape(1, 1, 1, -1), cos, sin).ravel()


@given(m=st.integers(0, 10**6), n=st.integers(0, 10**6), shift=st.integers(0, 10**6))
def test_scores_depend_on_the_distance_only(m, n, shift):
    q, k = jax.random.normal(jax.random.key(0), (2, 16))
    score = jnp.dot(rotated(q, m), rotated(k, n))
    moved = jnp.dot(rotated(q, m + shift), rotated(k, n + shift))
    np.testing.assert_allclose(score, moved, atol=2e-4)


def test_rotation_keeps_lengths_and_position_zero_keeps_everything():
    x = jax.random.normal(jax.random.key(1), (16,))
    np.testing.assert_array_equal(rotated(x, 0), x)
    for position in (1, 1000, 123_456_789):
        length = jnp.linalg.norm(rotated(x, position))
        np.testing.assert_allclose(length, jnp.linalg.norm(x), rtol=1e-5)


def test_linear_scaling_at_a_multiple_is_the_default():
    positions = jnp.arange(0, 4096, 4)[None]
    scaled = rope_cos_sin(LinearRope(10_000.0, 4.0), 64, positions)
    plain = rope_cos_sin(Rope(10_000.0), 64, positions // 4)
    np.testing.assert_allclose(scaled[0], plain[0], atol=2e-6)
    np.testing.assert_allclose(scaled[1], plain[1], atol=2e-6)


def test_llama3_with_factor_one_is_the_default():
    np.testing.assert_allclose(Llama3Rope(factor=1.0).inv_freq(128), Rope().inv_freq(128))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(theta=0.0), "Rope.theta = 0.0 must be above 0"),
        (lambda: LinearRope(factor=0.5), "LinearRope.factor = 0.5 must be at least 1"),
        (lambda: Llama3Rope(high_freq_factor=1.0), "must be above low_freq_factor = 1.0"),
        (lambda: Llama3Rope(original_context_length=0), "original_context_length = 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
