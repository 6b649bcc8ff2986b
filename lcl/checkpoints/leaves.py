"""A state as named leaves: the one spelling of a leaf's path, for files, digests and messages.

    State(params={"head": {"kernel": A}}, opt=(Adam(mu=B),))

    names    params/head/kernel -> A        opt/0/mu -> B
    nested   {"params": {"head": {"kernel": A}}, "opt": {"0": {"mu": B}}}

What lies on disk is the nested form: plain dicts, so that any Orbax tool reads it, a part of it can
be restored (`params` alone), and a checkpoint does not depend on the classes that a version of
Optax happens to use.
"""

from __future__ import annotations

from typing import Any


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path, in the tree's own order.

    Raises:
        ValueError: two leaves spell their paths alike (a dict key with a slash in it).

    Example:
        >>> named_leaves({"a": (1, 2)})
        {'a/0': 1, 'a/1': 2}
    """
    return {"/".join(parts): leaf for parts, leaf in _flatten(tree)}


def nest(tree: Any) -> dict[str, Any]:
    """The tree as plain nested dicts with string keys.

    Example:
        >>> nest({"a": (1, 2)})
        {'a': {'0': 1, '1': 2}}
    """
    nested: dict[str, Any] = {}
    for parts, leaf in _flatten(tree):
        *parents, last = parts
        here = nested
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = leaf
    return nested


def unnest(nested: dict[str, Any], like: Any) -> Any:
    """The inverse of `nest`: the leaves of `nested` in the structure of `like`."""
    import jax

    leaves = []
    for parts, _ in _flatten(like):
        here: Any = nested
        for part in parts:
            here = here[part]
        leaves.append(here)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def describe(leaf: Any) -> str:
    """Dtype and shape in a word, such as "float32[258,64]"."""
    return f"{leaf.dtype}[{','.join(str(size) for size in leaf.shape)}]"


def _flatten(tree: Any) -> list[tuple[list[str], Any]]:
    import jax

    flat: list[tuple[list[str], Any]] = []
    seen: set[str] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path] or ["value"]
        name = "/".join(parts)
        if name in seen:
            raise ValueError(f"two leaves of the state are called {name!r}: rename one of them")
        seen.add(name)
        flat.append((parts, leaf))
    return flat
