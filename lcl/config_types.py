"""What a configuration's values may be: type checks at the door, freezing, and the normal form.

Pure functions over values and type hints; nothing here knows gin or any room.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# How a value in a file calls something: (what, is it called now?); None for a plain literal.
TargetFn = Callable[[Any], "tuple[Callable[..., Any], bool] | None"]


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The resolved type hints of a class's or function's parameters.

    A hint that cannot be resolved here (imported for type checkers only) is left out: that
    parameter goes unchecked.

    Example:
        >>> hints_of(math.isclose)
        {}
    """
    scopes = target.__mro__[::-1] if inspect.isclass(target) else (target,)
    hints: dict[str, Any] = {}
    for owner in scopes:
        module = inspect.getmodule(owner)
        names = {**vars(typing), **(vars(module) if module else {})}
        for name, hint in (getattr(owner, "__annotations__", None) or {}).items():
            try:
                hints[name] = eval(hint, names) if isinstance(hint, str) else hint  # noqa: S307
            except (NameError, AttributeError, TypeError):
                hints.pop(name, None)
    return hints


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a hint alone is its own only one."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for arg in typing.get_args(hint) for option in _options(arg))
    return (hint,)


def accepts_result(hint: Any, target: Callable[..., Any]) -> bool:
    """Whether a parameter with this hint is there for what `target()` returns, or a list of it.

    A class is taken by its own type; a function only if it says that it returns a function, or an
    object of a class that is not one of Python's own (numbers, texts, paths).

    Example:
        >>> accepts_result(typing.Sequence[int] | None, int), accepts_result(str, int)
        (True, False)
    """
    is_class = inspect.isclass(target)
    made = target if is_class else hints_of(target).get("return")
    returns_function = typing.get_origin(made) is collections.abc.Callable
    if not (returns_function or is_class or (inspect.isclass(made) and not _is_pythons(made))):
        return False
    # What a function makes may well be callable, and is still not what a Callable is there for.
    too_wide = (object,) if is_class else (object, collections.abc.Callable)
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        if returns_function:
            if origin is collections.abc.Callable:
                return True
        elif inspect.isclass(made) and inspect.isclass(origin) and origin not in too_wide:
            if not getattr(origin, "_is_protocol", False) and issubclass(made, origin):
                return True
        if any(accepts_result(arg, target) for arg in typing.get_args(option) if arg is not hint):
            return True
    return False


def _is_pythons(made: type) -> bool:
    return made.__module__.partition(".")[0] in sys.stdlib_module_names


def describe(hint: Any) -> str:
    """A hint as a person writes it.

    Example:
        >>> describe(int | None), describe(typing.Literal["a", "b"])
        ('int or None', "'a' or 'b'")
    """
    words = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            words += [repr(arg) for arg in typing.get_args(option)]
        elif option is type(None):
            words.append("None")
        elif inspect.isclass(option) and not typing.get_args(option):
            words.append(option.__name__)
        else:
            words.append(
                re.sub(r"\b(typing|collections\.abc)\.|\b\w+(\.\w+)*\.(?=[A-Z])", "", str(option))
            )
    return " or ".join(words)


def mismatch(value: Any, hint: Any, target_fn: TargetFn = lambda value: None) -> str:
    """Why `value` cannot be passed where `hint` is asked for; empty if it can.

    Example:
        >>> mismatch(3, float), mismatch("3", int)
        ('', "wants int, got '3'")
        >>> mismatch([1, 2.5], typing.Sequence[int])
        'wants Sequence[int], got [1, 2.5]'
    """
    if _fits(value, hint, target_fn):
        return ""
    called = target_fn(value)
    if called is not None and not called[1] and _fits_reference(called[0], True, hint):
        return f"wants {describe(hint)}: write {value!r}() to call it"
    mend = ""
    if isinstance(value, float) and value.is_integer() and _fits(int(value), hint, target_fn):
        mend = f"; write {int(value)}"
    return f"wants {describe(hint)}, got {value!r}{mend}"


def _fits(value: Any, hint: Any, target_fn: TargetFn) -> bool:
    return any(_fits_option(value, option, target_fn) for option in _options(hint))


def _fits_option(value: Any, hint: Any, target_fn: TargetFn) -> bool:
    if hint is Any or isinstance(hint, typing.TypeVar | str) or hint is inspect.Parameter.empty:
        return True
    called = target_fn(value)
    if called is not None:
        return _fits_reference(*called, hint)
    if hint is None or hint is type(None):
        return value is None
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return value in args
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not inspect.isclass(origin):
        return True
    if getattr(origin, "_is_protocol", False) or origin is collections.abc.Callable:
        # A plain number or text is no object with methods; whatever else it is, let it be.
        return not isinstance(value, str | int | float | list | tuple | dict | None)
    if issubclass(origin, str | bytes):
        return isinstance(value, origin)
    if issubclass(origin, collections.abc.Mapping):
        key_hint, value_hint = args if len(args) == 2 else (Any, Any)
        return isinstance(value, Mapping) and all(
            _fits(k, key_hint, target_fn) and _fits(v, value_hint, target_fn)
            for k, v in value.items()
        )
    if issubclass(origin, collections.abc.Collection):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(
                _fits(v, a, target_fn) for v, a in zip(value, args, strict=True)
            )
        return all(_fits(v, args[0] if args else Any, target_fn) for v in value)
    return isinstance(value, origin)


def _fits_reference(target: Callable[..., Any], evaluate: bool, hint: Any) -> bool:
    """Whether `@target` (or `@target()`) may stand where `hint` is asked for."""
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        if option is Any or not inspect.isclass(origin):
            return True
        if not evaluate:
            if origin is collections.abc.Callable or origin is type:
                return True
            continue
        made = target if inspect.isclass(target) else hints_of(target).get("return", Any)
        made = typing.get_origin(made) or made
        if getattr(origin, "_is_protocol", False) or origin is object or not inspect.isclass(made):
            return True
        if origin is collections.abc.Callable:
            if made is collections.abc.Callable or _instances_callable(made):
                return True
            continue
        if issubclass(made, origin):
            return True
    return False


def _instances_callable(cls: type) -> bool:
    return "__call__" in {name for base in cls.__mro__ for name in vars(base)}


def literal(value: Any) -> str:
    """A literal as gin text: python's repr, but for infinity, which gin cannot read by name.

    Example:
        >>> literal({"a": [1.0, -math.inf]})
        "{'a': [1.0, -1e999]}"
    """
    if isinstance(value, float):
        return repr(value).replace("inf", "1e999")
    if type(value) is dict:
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(literal, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def freeze(value: Any, hint: Any) -> Any:
    """gin's lists as tuples, so that configuration objects are immutable and can be hashed.

    Example:
        >>> freeze([1, [2]], typing.Sequence[Any])
        (1, (2,))
        >>> freeze([1], list[int])
        [1]
    """
    if any(o is list or typing.get_origin(o) is list for o in _options(hint)):
        return value
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return tuple(freeze(item, Any) for item in value)
    if type(value) is dict:
        return {k: freeze(v, Any) for k, v in value.items()}
    return value


# ---- the normal form ----------------------------------------------------------------------------


def normal_form(
    root: str,
    values: Mapping[str, Any],
    names: Mapping[Any, str],
    made: Mapping[int, tuple[str, dict[str, Any], Any]],
) -> str:
    """Built arguments as gin text: every value of every object, each on a line of its own.

    Objects get the place they stand in as scope: `train.model` is `@model/DecoderConfig()`, an
    element of a list is named after its `name` or its index.

    Args:
        root: the configurable's name.
        values: its arguments.
        names: what may be called in gin text, {class or function: name}.
        made: results of functions, {id(result): (function's name, its arguments, result)}.

    Returns:
        Sorted gin text; a value which gin cannot write stands in a comment.
    """
    return _NormalForm(names, made).text(root, values)


class _Unwritable(Exception):
    """A value without gin text."""


class _NormalForm:
    def __init__(self, names: Mapping[Any, str], made: Mapping[int, tuple[str, dict, Any]]):
        self.names = names
        self.made = made
        self.sections: dict[str, list[str]] = {}

    def text(self, root: str, values: Mapping[str, Any]) -> str:
        self._section("", root, values)
        sections = sorted(self.sections.items())
        return "\n".join("\n".join([*lines, ""]) for _, lines in sections)

    def _section(self, scope: str, name: str, values: Mapping[str, Any]) -> None:
        owner = f"{scope}/{name}" if scope else name
        lines: list[str] = []
        self.sections[scope] = lines
        if not values:
            lines.append(f"# {owner} has no parameters")
        for key, value in sorted(values.items()):
            place = f"{scope}_{key}" if scope else key
            try:
                lines.append(f"{owner}.{key} = {self._value(value, place)}")
            except _Unwritable as error:
                lines.append(f"# {owner}.{key} = {error}")

    def _object(self, place: str, name: str, values: Mapping[str, Any]) -> str:
        scope = place
        while scope in self.sections:
            scope += "_"
        self._section(scope, name, values)
        return f"@{scope}/{name}()"

    def _value(self, value: Any, place: str) -> str:
        if id(value) in self.made and not dataclasses.is_dataclass(value):
            name, kwargs, _ = self.made[id(value)]
            return self._object(place, name, kwargs)
        if value is None or isinstance(value, bool | str | int):
            return repr(value)
        if isinstance(value, float):
            return self._float(value)
        if dataclasses.is_dataclass(value) and type(value) in self.names:
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            return self._object(place, self.names[type(value)], fields)
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda item: str(item[0]))
            return (
                "{"
                + ", ".join(
                    f"{k!r}: {self._value(v, self._element(place, v, k))}" for k, v in items
                )
                + "}"
            )
        if isinstance(value, list | tuple):
            items_text = [self._value(v, self._element(place, v, i)) for i, v in enumerate(value)]
            return "[" + ", ".join(items_text) + "]"
        if isinstance(value, collections.abc.Hashable) and value in self.names:
            return f"@{self.names[value]}"
        named = value if hasattr(value, "__qualname__") else type(value)
        raise _Unwritable(f"<{named.__module__}.{named.__qualname__}>")

    @staticmethod
    def _float(value: float) -> str:
        if math.isnan(value):
            raise _Unwritable("nan")
        return literal(value)

    @staticmethod
    def _element(place: str, value: Any, key: Any) -> str:
        """The scope of an element: what it is called, or where it stands."""
        name = getattr(value, "name", None)
        if isinstance(name, str) and name:
            return re.sub(r"\W", "_", name if name[0].isalpha() else f"_{name}")
        return re.sub(r"\W", "_", f"{place}_{key}")
