"""Rotary position embeddings (RoPE): frequencies as small frozen dataclasses, angles exact to 1e-6.

RoPE (Su et al. 2021, arXiv 2104.09864) turns the pair (x_i, x_{i+H/2}) of every query and key by
the angle `position * inv_freq_i`. A *kind* of RoPE differs from another only in `inv_freq` and in
`attention_factor`; each is a dataclass below and a new one needs no change anywhere else.

**Why the angles are not computed as `position * inv_freq` in float32.** A float32 product of size
10^6 is only known to 0.06, so at a million tokens the fast pairs would be turned by an angle that
is wrong by several degrees. An angle matters only modulo a whole turn, so we compute it in whole
numbers: a pair's frequency in turns per position, times 2^32, is a uint32 whose wrap-around *is*
the reduction modulo one turn. A position is cut into four digits of 8 bits and each digit has its
own frequency word, reduced in float64 on the host:

    position = d0 + 2^8 d1 + 2^16 d2 + 2^24 d3
    turns    = d0 w0 +    d1 w1 +     d2 w2 +     d3 w3   (mod 2^32, integer arithmetic, exact)
    w_j      = round(2^32 * frac(2^(8j) * inv_freq / 2 pi))

Each word is rounded by at most half, so the sum is off by at most 4 * 255 / 2 of 2^32 parts of a
turn: 7.5e-7 radian, at every int32 position.

Shapes: B batch, T row length, N heads, H head dim, R = H/2 rotated pairs.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

_DIGITS = 4
_DIGIT_BITS = 8


@dataclasses.dataclass(frozen=True)
class Rope:
    """Plain RoPE: inv_freq_i = theta^(-2i/H).

    Attributes:
      theta: base of the geometric series of frequencies, > 0. Llama-2 has 10,000; Llama-3 500,000
        (raising it for longer contexts is "adjusted base frequency", arXiv 2309.16039).

    Example:
      >>> Rope(theta=10_000.0).inv_freq(4)
      array([1.  , 0.01])
    """

    theta: float = 500_000.0

    def __post_init__(self) -> None:
        _require_positive(self, "theta")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Frequencies in radians per position, float64 [head_dim / 2]."""
        return float(self.theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied with (so logits with its square); 1 for most kinds."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`.

    Attributes:
      factor: how many times longer the context becomes, >= 1.

    Example:
      >>> LinearRope(theta=10_000.0, factor=2.0).inv_freq(4)
      array([0.5  , 0.005])
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least_one(self, "factor")

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Frequencies in radians per position, float64 [head_dim / 2]."""
        return super().inv_freq(head_dim) / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Rope(Rope):
    """The frequency-dependent scaling of Llama 3.1 (Meta's reference code, `apply_scaling`).

    Pairs whose wavelength is short against the original context are kept, long ones are slowed by
    `factor`, and those between are interpolated:

        wavelength < original / high_freq_factor : inv_freq
        wavelength > original / low_freq_factor  : inv_freq / factor
        else: (1 - s) inv_freq / factor + s inv_freq,
              s = (original / wavelength - low) / (high - low)

    Attributes:
      factor: 8 in Llama 3.1, 32 in Llama 3.2.
      low_freq_factor: see above; below high_freq_factor.
      high_freq_factor: see above.
      original_context_length: the context before the extension, in tokens.

    Example:
      >>> plain, scaled = Rope().inv_freq(128), Llama3Rope().inv_freq(128)
      >>> bool(scaled[0] == plain[0]), bool(scaled[-1] == plain[-1] / 8)
      (True, True)
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least_one(self, "factor")
        _require_positive(self, "low_freq_factor")
        _require_positive(self, "original_context_length")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"Llama3Rope.high_freq_factor = {self.high_freq_factor} must be above "
                f"low_freq_factor = {self.low_freq_factor}"
            )

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Frequencies in radians per position, float64 [head_dim / 2]."""
        plain = super().inv_freq(head_dim)
        periods_in_context = self.original_context_length * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        # Clipping the interpolation weight to [0, 1] gives the two outer cases as well.
        keep = np.clip((periods_in_context - low) / (high - low), 0.0, 1.0)
        return (1.0 - keep) * plain / self.factor + keep * plain


def rope_cos_sin(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle, computed once per step for all layers.

    Args:
      rope: the kind of RoPE.
      head_dim: H, even.
      positions_BT: int32, >= 0. Any integers: they may restart, jump or repeat.

    Returns:
      (cos_BTR, sin_BTR), float32, multiplied by `rope.attention_factor`.

    Example:
      >>> cos, sin = rope_cos_sin(Rope(), 4, jnp.array([[0]]))
      >>> cos.tolist(), sin.tolist()
      ([[[1.0, 1.0]]], [[[0.0, 0.0]]])
    """
    words = _frequency_words(rope.inv_freq(head_dim))
    positions = positions_BT.astype(jnp.uint32)[..., None]
    digit_mask = jnp.uint32(2**_DIGIT_BITS - 1)
    turns = jnp.zeros((), jnp.uint32)
    for j in range(_DIGITS):
        digit = (positions >> jnp.uint32(_DIGIT_BITS * j)) & digit_mask
        turns = turns + digit * words[j]
    # Read as signed, the fraction of a turn is in [-1/2, 1/2): the angle in [-pi, pi).
    signed_turns = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
    angles_BTR = signed_turns * np.float32(2 * math.pi / 2**32)
    factor = np.float32(rope.attention_factor)
    return jnp.cos(angles_BTR) * factor, jnp.sin(angles_BTR) * factor


def apply_rope(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Turns every pair (x_i, x_{i+H/2}) by its angle (Hugging Face's half-and-half pairing).

        [a | b]  ->  [a cos - b sin | b cos + a sin]        a, b: the two halves of the head

    Args:
      x_BTNH: queries or keys, any float dtype; computed in float32.
      cos_BTR: from `rope_cos_sin`.
      sin_BTR: from `rope_cos_sin`.

    Returns:
      float32 [B, T, N, H].

    Example:
      >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
      >>> apply_rope(x, cos_BTR=jnp.zeros((1, 1, 1)), sin_BTR=jnp.ones((1, 1, 1))).ravel().tolist()
      [0.0, 1.0]
    """
    # No gradient flows into positions; without this, x's halves would be kept for it.
    cos, sin = (jax.lax.stop_gradient(x)[:, :, None, :] for x in (cos_BTR, sin_BTR))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _frequency_words(inv_freq_R: np.ndarray) -> np.ndarray:
    """The fixed-point frequency of each digit of a position: uint32 [digits, R] (see the top)."""
    scale = 2.0 ** (_DIGIT_BITS * np.arange(_DIGITS, dtype=np.float64))[:, None]
    fraction = np.mod(scale * inv_freq_R / (2 * math.pi), 1.0)
    return (np.rint(fraction * 2.0**32).astype(np.uint64) & np.uint64(2**32 - 1)).astype(np.uint32)


def _require_positive(rope: Rope, field: str) -> None:
    value = getattr(rope, field)
    if not value > 0:
        raise ValueError(f"{type(rope).__name__}.{field} = {value!r} must be above 0")


def _require_at_least_one(rope: Rope, field: str) -> None:
    value = getattr(rope, field)
    if not value >= 1:
        raise ValueError(f"{type(rope).__name__}.{field} = {value!r} must be at least 1")
