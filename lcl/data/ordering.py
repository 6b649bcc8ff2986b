"""Orders: which document comes after which, as keyed pure functions of integers.

Nothing here holds a random state. A decision is named by a readable tuple, the tuple is hashed to a
key (`named_key`), and the key picks a permutation. The same name gives the same permutation in any
process, on any machine, under any NumPy: only integer arithmetic and Philox's raw words are used,
never `Generator.permutation`, whose stream NumPy may change between releases (NEP 19).

Two kinds of permutation, for two uses:

    shuffle(n, ...)       the whole permutation as a table   (once a plan: an order of documents)
    permute(i, n, key)    one entry of it, no table at all   (every step: rows of an epoch, replay)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lcl.data.fingerprints import fingerprint

_NUM_ROUNDS = 8
_SMALL = 1024  # on a grid this small 8 rounds are not yet uniform over permutations; 24 are
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's multipliers
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(31)


def named_key(*parts: Any, bits: int = 64) -> int:
    """Hash a readable tuple to an integer key: `named_key("order", seed, domain)`.

    Keys are named, never drawn or split, so adding a decision cannot shift another one's numbers.

    Args:
        *parts: strings, integers, floats and (nested) tuples of them.
        bits: width of the key, a multiple of 4, at most 128.

    Returns:
        An int in [0, 2**bits).

    Example:
        >>> named_key("order", 0, "python") == named_key("order", 0, "python")
        True
        >>> named_key("order", 0, "python") == named_key("order", 1, "python")
        False
    """
    return int(fingerprint(*parts)[: bits // 4], 16)


def shuffle_with_key(size: int, key: int) -> np.ndarray:
    """Return the permutation of `range(size)` that a 128-bit key names, int64[size].

    Sorting Philox's raw 64-bit words: the raw words of a bit generator are frozen by NumPy.
    """
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def shuffle(num_documents: int, *, seed: int, domain: str) -> np.ndarray:
    """Return the seeded order of a domain's documents.

    Args:
        num_documents: N >= 0.
        seed: the run's seed.
        domain: the domain's name; two domains of one size get unrelated orders.

    Returns:
        order_N, int64[N]: order_N[i] is the document that comes i-th. A permutation.

    Example:
        >>> sorted(shuffle(5, seed=0, domain="python").tolist())
        [0, 1, 2, 3, 4]
    """
    if num_documents < 0:
        raise ValueError(f"num_documents is {num_documents}; give a count of 0 or more")
    return shuffle_with_key(num_documents, named_key("order", seed, domain, bits=128))


def _feistel(
    index: np.ndarray,
    num_left: np.ndarray,
    num_right: np.ndarray,
    key: np.ndarray,
    num_rounds: int = _NUM_ROUNDS,
) -> np.ndarray:
    """Apply Feistel rounds on the grid Z_left x Z_right; all arrays uint64[n]."""
    left, right = np.divmod(index, num_right)
    for i in range(num_rounds):
        key = key + _GOLDEN
        word = ((right if i % 2 == 0 else left) ^ key) * _MIX_1
        word ^= word >> _SHIFT
        word *= _MIX_2
        word ^= word >> _SHIFT
        # Reduce before adding: left + word could wrap at 2**64 and the round not be a bijection.
        if i % 2 == 0:
            left = (left + word % num_left) % num_left
        else:
            right = (right + word % num_right) % num_right
    return left * num_right + right


def _on_grid(
    index: np.ndarray, num_left: np.ndarray, num_right: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """Permute the grid's points; an entry's result depends on its own arguments only."""
    out = _feistel(index, num_left, num_right, key)
    small = np.flatnonzero(num_left * num_right <= _SMALL)
    if small.size:
        out[small] = _feistel(
            out[small], num_left[small], num_right[small], ~key[small], 2 * _NUM_ROUNDS
        )
    return out


def permute(index: Any, size: Any, key: Any) -> np.ndarray:
    """Look up entries of keyed permutations of `range(size)` without building them.

    A Feistel network on the grid a x b, a = ceil(sqrt(size)), b = ceil(size / a). Each round adds
    a keyed hash of one coordinate to the other, which is a bijection of the grid; the few grid
    points past `size` (fewer than sqrt(size)) are walked on until they fall inside, so the result
    is a permutation of exactly `range(size)` (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains", the generalised Feistel and cycle-walking constructions). O(1) memory; constant
    time.

        index 0 1 2 3 4 | 5 (outside size=5)        grid 3 x 2
                |                                   0 1
        rounds  4 0 5 1 3 | 2                       2 3
                    |                               4 5   <- 5 is outside: apply the rounds again
        walked  4 0 2 1 3

    Args:
        index: int array in [0, size), any shape.
        size: int or array broadcastable with index, >= 1: each entry's permutation may have its
          own.
        key: int in [0, 2**64) or uint64 array broadcastable with index.

    Returns:
        int64 array of the broadcast shape.

    Example:
        >>> sorted(permute(np.arange(5), 5, key=7).tolist())
        [0, 1, 2, 3, 4]
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    shape = index.shape
    # 1-d arrays wrap silently on overflow, as a hash wants; NumPy scalars would warn.
    index, size, key = index.ravel(), size.ravel(), key.ravel()
    num_left = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    num_right = (size + num_left - np.uint64(1)) // num_left
    out = _on_grid(index, num_left, num_right, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _on_grid(out[outside], num_left[outside], num_right[outside], key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64).reshape(shape)
