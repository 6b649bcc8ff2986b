"""A fingerprint of every array of a state, bit for bit, the same on every mesh.

    digest(x) = sum over elements i of mix(bits(x_i) ^ place(i))   mod 2^32
    place(i)  = sum over dims d of mix(i_d + (d + 1) * golden)     mod 2^32

Addition modulo 2^32 is exactly associative, so the sum does not hang on how an array is cut over
devices; the place makes two swapped values visible, and the bits make -0.0 differ from 0.0 and one
NaN from another. `mix` is a bijective 32-bit finaliser (lowbias32 of the "hash prospector" search):
one flipped bit always changes its element's term, hence the sum. Anything else escapes with a
chance of 2^-32 a leaf.

It is computed where the array lies, under jit, one small program a distinct shape, dtype and
sharding; only 4 bytes a leaf come to the host. Against rot and torn files, not against an
adversary.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from lcl.checkpoints.leaves import named_leaves
from lcl.parallel.run_ahead import SMALL_PROGRAMS, RunAhead

_GOLDEN = 0x9E3779B9


def state_digest(tree: Any) -> dict[str, int]:
    """The digest of every leaf.

    Args:
        tree: pytree of arrays of up to 32 bits (and typed PRNG keys).

    Returns:
        {leaf path: unsigned 32-bit number}.

    Example:
        >>> import numpy as np
        >>> a, b = (state_digest({"w": np.array(w, np.float32)})["w"] for w in ([1, 2], [2, 1]))
        >>> a == b
        False
    """
    import jax

    named = named_leaves(tree)
    ahead, digests = RunAhead(SMALL_PROGRAMS), []
    for leaf in named.values():
        digests.append(_array_digest()(_plain(leaf)))
        ahead.add(digests[-1])
    host = jax.device_get(digests)
    return {name: int(value) for name, value in zip(named, host, strict=True)}


def numpy_digest(array: Any) -> int:
    """The same number by NumPy alone: the definition, and the oracle of the tests."""
    array = np.asarray(array)
    width = array.dtype.itemsize
    if array.dtype == bool:
        bits = array.astype(np.uint32)
    else:
        bits = np.ascontiguousarray(array).view(f"uint{8 * width}").astype(np.uint32)
    bits = bits.reshape(array.shape)
    place = np.zeros(array.shape, np.uint32)
    for dim, size in enumerate(array.shape):
        index = np.arange(size, dtype=np.uint32) + np.uint32((dim + 1) * _GOLDEN & 0xFFFFFFFF)
        place += _mix(index).reshape([size if d == dim else 1 for d in range(array.ndim)])
    with np.errstate(over="ignore"):  # a lone scalar warns when it wraps around
        return int(np.sum(_mix(bits ^ place), dtype=np.uint32))


def _mix(x: Any) -> Any:
    """Chris Wellons' lowbias32; for NumPy and JAX alike."""
    word = np.uint32
    x = (x ^ (x >> word(16))) * word(0x7FEB352D)
    x = (x ^ (x >> word(15))) * word(0x846CA68B)
    return x ^ (x >> word(16))


def _plain(leaf: Any) -> Any:
    """A typed PRNG key's data, anything else as it is."""
    import jax

    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
    if leaf.dtype.itemsize > 4:
        raise ValueError(
            f"a state leaf is {leaf.dtype}: keep states to 32 bits, such as "
            f"jnp.asarray(x, jnp.{leaf.dtype.name.replace('64', '32')})"
        )
    return leaf


@functools.cache
def _array_digest() -> Any:
    """The jitted digest of one array; JAX caches one program a shape, dtype and sharding."""
    import jax
    import jax.numpy as jnp

    def lcl_digest(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            bits = x.astype(jnp.uint32)
        else:
            width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
            bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for dim, size in enumerate(x.shape):
            index = jnp.arange(size, dtype=jnp.uint32) + np.uint32((dim + 1) * _GOLDEN & 0xFFFFFFFF)
            place += jax.lax.broadcast_in_dim(_mix(index), x.shape, (dim,))
        return jnp.sum(_mix(bits ^ place), dtype=jnp.uint32)

    return jax.jit(lcl_digest)
