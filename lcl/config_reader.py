"""Reads gin files and bindings into statements and finds the first mistake in them.

On gin's own parser, but before gin binds anything: so each error can name its file and line and
the nearest right name, and nothing has been built when it is raised. `lcl/config.py` is the door.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import io
import pathlib
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

from lcl import config_types, files

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MAX_INCLUDE_LEVELS = 2


class ConfigError(ValueError):
    """A mistake in a configuration: one line, naming where it is and the mend."""


@dataclasses.dataclass(frozen=True)
class Configurable:
    """One name that gin files may use: a frozen dataclass or a function."""

    name: str
    target: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters which need not be given, and what they are then."""
        return {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }

    def missing(self, given: Iterable[str]) -> list[str]:
        """The parameters without a default that are not given."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is inspect.Parameter.empty and parameter.kind in named
        ]
        return [name for name in needed if name not in set(given)]


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Name()` or `@Name` as it stands in a file; its repr is gin text."""

    selector: str
    evaluate: bool

    @property
    def scopes(self) -> list[str]:
        return self.selector.split("/")[:-1]

    @property
    def name(self) -> str:
        return self.selector.split("/")[-1]

    def __repr__(self) -> str:
        return f"@{self.selector}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` as it stands in a file; its repr is gin text."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass(frozen=True)
class Statement:
    """One binding `scope/selector.parameter = value` (a macro has no parameter) and its place."""

    scope: str
    selector: str
    parameter: str
    value: Any
    where: str

    @property
    def key(self) -> str:
        scoped = f"{self.scope}/{self.selector}" if self.scope else self.selector
        return f"{scoped}.{self.parameter}" if self.parameter else scoped

    def __str__(self) -> str:
        return f"{self.key} = {config_types.literal(self.value)}"


# ---- reading ------------------------------------------------------------------------------------


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as text, so that they can be checked first."""

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def read_file(name: str, *, level: int = 0, via: str = "") -> Iterator[Statement]:
    """The statements of a file and, each in its place, of the files it includes.

    Args:
        name: a path, from the working directory or else from the repository's root.
        level: how many includes led here.
        via: the place of the include that led here.
    """
    if level > MAX_INCLUDE_LEVELS:
        raise ConfigError(
            f"{via}: {name!r} would be include level {level}; {MAX_INCLUDE_LEVELS} are allowed, so "
            "that a config can be read: include it from the run file"
        )
    path = _find_file(name, via)
    shown = _shown_path(path)
    yield from _statements(path.read_text(), lambda line: f"{shown}:{line}", level)


def read_binding(binding: str) -> Iterator[Statement]:
    """The statement of a command line's `train.seed=1`."""
    key = binding.partition("=")[0].strip()
    yield from _statements(binding + "\n", lambda line: f"--gin.{key}", 0)


def _statements(text: str, where: Callable[[int], str], level: int) -> Iterator[Statement]:
    for item in _parse(text, where):
        place = where(item.location.line_num)
        if isinstance(item, config_parser.IncludeStatement):
            yield from read_file(item.filename, level=level + 1, via=place)
        elif isinstance(item, config_parser.ImportStatement):
            try:
                importlib.import_module(item.module)
            except ImportError as error:
                raise ConfigError(f"{place}: cannot import {item.module}: {error}") from error
        elif isinstance(item, config_parser.BindingStatement):
            yield Statement(item.scope, item.selector, item.arg_name, item.value, place)
        # What is left is the head of a block `Name:`, whose bindings follow one by one.


def _parse(text: str, where: Callable[[int], str]) -> Iterator[Any]:
    """gin's statements of `text`; a syntax error becomes one line. `where(line)` names a place."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Delegate())
    except (SyntaxError, tokenize.TokenError) as error:
        line = getattr(error, "lineno", None) or error.args[1][0]
        lines = text.splitlines() or [""]
        shown = lines[min(max(line, 1), len(lines)) - 1].strip()
        message = first_line(error.args[0])
        literal = "malformed node" in message or "Unable to parse value" in message
        mend = '; a text value needs quotes: name = "value"' if literal else ""
        raise ConfigError(f"{where(line)}: not gin: {message} in `{shown}`{mend}") from None


def _roots() -> tuple[pathlib.Path, ...]:
    return pathlib.Path.cwd(), REPOSITORY


def _shown_path(path: pathlib.Path) -> str:
    for root in _roots():
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def _find_file(name: str, via: str) -> pathlib.Path:
    if files.is_remote(name) and (remote := files.place(name)).exists():
        return remote
    for root in _roots():
        if (root / name).is_file():
            return root / name
    near = {_shown_path(p) for root in _roots() for p in (root / name).parent.glob("*.gin")}
    near.update(_shown_path(p) for p in (REPOSITORY / "configs").rglob("*.gin"))
    hint = nearest(name, near) or nearest(
        pathlib.Path(name).name, near, key=lambda path: pathlib.Path(path).name
    )
    where = f"{via}: " if via else ""
    raise ConfigError(f"{where}no config file {name!r}{hint or f'; looked in . and {REPOSITORY}'}")


# ---- checking -----------------------------------------------------------------------------------


def first_line(error: object) -> str:
    """The first line of an error's words."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: str, names: Iterable[str], *, key: Callable[[str], str] = str) -> str:
    """`; did you mean 'x'?`, or nothing if nothing is near.

    Example:
        >>> nearest("sed", ["seed", "model"])
        "; did you mean 'seed'?"
    """
    by_key = {key(n).lower(): n for n in sorted(names, reverse=True)}
    found = difflib.get_close_matches(name.lower(), by_key, n=1, cutoff=0.6)
    return f"; did you mean {by_key[found[0]]!r}?" if found else ""


def _walk(value: Any) -> Iterator[Reference | Macro]:
    """Every reference and macro inside a value."""
    if isinstance(value, Reference | Macro):
        yield value
    elif isinstance(value, Mapping):
        yield from _walk([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)


def check(statements: Sequence[Statement], configurables: Mapping[str, Configurable]) -> None:
    """Raises a `ConfigError` for the first mistake: names first, then effects, then types."""
    _Checker(statements, configurables).check()


class _Checker:
    def __init__(self, statements: Sequence[Statement], configurables: Mapping[str, Configurable]):
        self.configurables = configurables
        self.statements = statements
        self.bindings = [s for s in statements if s.parameter]
        self.macros = {s.key: s for s in statements if not s.parameter}
        found = [(s, r) for s in statements for r in _walk(s.value)]
        self.references = [(s, r) for s, r in found if isinstance(r, Reference)]
        self.uses = [(s, r) for s, r in found if isinstance(r, Macro)]

    def check(self) -> None:
        for statement in self.bindings:
            self._name(statement)
        for statement, reference in self.references:
            if reference.name not in self.configurables:
                raise self._unknown(statement, reference.name)
        self._macros()
        self._required()
        self._effects()
        for statement in self.bindings:
            hint = self.configurables[statement.selector].hints.get(statement.parameter, Any)
            problem = config_types.mismatch(self._resolved(statement.value), hint, self._target)
            if problem:
                raise ConfigError(f"{statement.where}: {statement.key} {problem}")

    def _unknown(self, s: Statement, name: str) -> ConfigError:
        hint = nearest(name, self.configurables)
        listed = "; there are " + ", ".join(sorted(self.configurables))
        return ConfigError(f"{s.where}: nothing is called {name!r}{hint or listed}")

    def _name(self, s: Statement) -> None:
        entry = self.configurables.get(s.selector)
        owners = [
            f"{name}.{s.parameter}"
            for name, other in sorted(self.configurables.items())
            if s.parameter in other.parameters
        ]
        if entry is None:
            if s.selector.partition(".")[0] in self.configurables and "." in s.selector:
                mend = f": {' or '.join(owners)}" if owners else ""
                raise ConfigError(
                    f"{s.where}: {s.key!r} reaches into an argument; bind the parameter of the "
                    f"object itself{mend}"
                )
            raise self._unknown(s, s.selector)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in entry.parameters.values())
        if s.parameter not in entry.parameters and not open_ended:
            hint = nearest(s.parameter, entry.parameters)
            if not hint and owners:
                hint = f"; there is {' and '.join(owners)}"
            listed = "; it has " + ", ".join(entry.parameters)
            raise ConfigError(
                f"{s.where}: {s.selector} has no parameter {s.parameter!r}{hint or listed}"
            )

    def _macros(self) -> None:
        for s, use in self.uses:
            if use != REQUIRED and use.name not in self.macros:
                hint = nearest(use.name, self.macros) or f"; give --gin.{use.name}=..."
                raise ConfigError(f"{s.where}: macro %{use.name} is not defined{hint}")
        used = {use.name for _, use in self.uses}
        for s in self.macros.values():
            if s.key not in used:
                hint = nearest(s.key, (used | set(self.configurables)) - {REQUIRED.name})
                raise ConfigError(f"{s.where}: no line uses the macro {s.key!r}{hint}")

    def _required(self) -> None:
        for s in {s.key: s for s in self.statements}.values():  # the last binding of each key
            if s.value == REQUIRED:
                raise ConfigError(f"{s.where}: {s.key} is required: give --gin.{s.key}=...")

    def _effects(self) -> None:
        """A binding that nothing can read is a misspelling or a misunderstanding."""
        scopes = {scope for _, r in self.references for scope in r.scopes}
        referred_until = self._referred_until()
        # Where a function is bound, the file is a whole: its objects must be reached from it.
        # Bindings of objects alone are for whoever loads them to call.
        whole = any(
            not inspect.isclass(self.configurables[s.selector].target) for s in self.bindings
        )
        for number, s in enumerate(self.statements) if whole else ():
            if not s.parameter:
                continue
            for scope in filter(None, s.scope.split("/")):
                if scope not in scopes:
                    hint = nearest(scope, scopes) or f": write @{scope}/{s.selector}()"
                    raise ConfigError(f"{s.where}: no reference uses the scope {scope!r}{hint}")
            takers = self._takers(s.selector)
            target = self.configurables[s.selector].target
            lost = number >= referred_until.get(s.selector, 0)
            if lost and (takers or inspect.isclass(target)):
                mend = f"; write {' or '.join(takers)} = @{s.selector}()" if takers else ""
                raise ConfigError(
                    f"{s.where}: {s.key} has no effect, as nothing refers to @{s.selector}(){mend}"
                )

    def _referred_until(self) -> dict[str, int]:
        """{name: the statement before which the last reference to it is replaced}.

        What was bound before that is an earlier file's, and harmless: another one took its object
        away. What is bound after it is lost.
        """
        replaced: dict[str, int] = {}
        until: dict[str, int] = {}
        for number, s in reversed(list(enumerate(self.statements))):
            end = replaced.get(s.key, len(self.statements))
            for found in _walk(s.value):
                if isinstance(found, Reference):
                    until[found.name] = max(end, until.get(found.name, 0))
            replaced[s.key] = number
        return until

    def _takers(self, name: str) -> list[str]:
        """The parameters that could be given `@name()`; none for what is called from outside."""
        return [
            f"{taker}.{parameter}"
            for taker, entry in sorted(self.configurables.items())
            for parameter, hint in entry.hints.items()
            if parameter in entry.parameters
            and config_types.accepts_result(hint, self.configurables[name].target)
        ]

    def _resolved(self, value: Any, depth: int = 0) -> Any:
        """The value with macros replaced by what they stand for."""
        if isinstance(value, Macro):
            if depth > len(self.macros):
                where = self.macros[value.name].where
                raise ConfigError(f"{where}: macro {value.name!r} is defined through itself")
            return self._resolved(self.macros[value.name].value, depth + 1)
        if isinstance(value, Mapping):
            return {k: self._resolved(v, depth) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._resolved(v, depth) for v in value)
        return value

    def _target(self, value: Any) -> tuple[Callable[..., Any], bool] | None:
        """For the type check: what a reference calls, and whether it is called."""
        if not isinstance(value, Reference):
            return None
        return self.configurables[value.name].target, value.evaluate
