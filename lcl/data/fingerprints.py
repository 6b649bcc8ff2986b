"""Fingerprints: short hashes that say whether two pieces of data are the same data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

DIGEST_BYTES = 16


def new_digest() -> hashlib.blake2b:
    """Returns an empty 128-bit BLAKE2b to stream bytes into."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def fingerprint(*parts: Any) -> str:
    """Hashes `parts` (bytes, or anything JSON can say) to 32 hexadecimal digits.

    Every part is written with its kind and length, so that moving a border between two parts
    changes the result; dictionaries are hashed with sorted keys, so their order does not.

    >>> fingerprint("ab", "c") == fingerprint("a", "bc")
    False
    >>> fingerprint({"x": 1, "y": 2}) == fingerprint({"y": 2, "x": 1})
    True
    """
    digest = new_digest()
    for part in parts:
        kind = b"b" if isinstance(part, bytes) else b"j"
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(kind + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
