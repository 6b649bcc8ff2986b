"""A configuration as lines: what the run card holds, compares and shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def describe(value: Any, name: str = "") -> dict[str, Any]:
    """Flattens nested dataclasses, mappings and sequences into `{path: plain value}`.

    Two configurations give the same run exactly if these lines are the same, so nothing in them
    may depend on a memory address: a function is named by its module and qualified name, and
    whatever JSON cannot hold by its repr.

    Args:
      value: a configuration object, or a plain value.
      name: the path of `value` itself.

    Returns:
      A dictionary in the order of the fields.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: int
    ...     tags: tuple
    >>> describe({"p": Point(1, ("a", "b"))})
    {'p.x': 1, 'p.tags[0]': 'a', 'p.tags[1]': 'b'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _join(children, name, "{}.{}")
    if isinstance(value, Mapping) and value:
        return _join(value, name, "{}.{}")
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and value:
        return _join(dict(enumerate(value)), name, "{}[{}]")
    if callable(value) and hasattr(value, "__qualname__"):
        return {name: f"{value.__module__}.{value.__qualname__}"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {name: value}
    return {name: repr(value)}


def _join(children: Mapping[Any, Any], name: str, form: str) -> dict[str, Any]:
    lines: dict[str, Any] = {}
    for key, child in children.items():
        path = form.format(name, key) if name or "[" in form else str(key)
        lines |= describe(child, path)
    return lines
