"""The gin door: from `*.gin` files and `--gin.x.y=z` bindings to the arguments of `train()`.

The library never imports gin; only this door does. It walks the rooms' `__all__`, registers every
frozen dataclass (and the functions a room lists in `CONFIGURABLES`), and lets gin call them:

    files + bindings --read--> statements --check--> flat gin text --gin--> train(**kwargs)

Reading and checking (config_reader.py) come first, so that every mistake is found before anything
is built and is one line which names the place and the nearest right name. gin's global state is
filled for one evaluation and emptied again: two configurations cannot see one another.

Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Tea:
    ...     cups: int = 1
    >>> register(Tea)
    >>> load([], ["Tea.cups = 2"]).call("Tea").cups
    2
    >>> load([], ["Tea.cusp = 2"])
    Traceback (most recent call last):
    lcl.config_reader.ConfigError: --gin.Tea.cusp: Tea has no parameter 'cusp'; did you mean 'cups'?
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin

from lcl import config_reader, config_types
from lcl.config_reader import ConfigError

__all__ = ["ROOMS", "Config", "ConfigError", "load", "register", "register_rooms"]

ROOMS = (
    "lcl.data",
    "lcl.models",
    "lcl.optim",
    "lcl.objectives",
    "lcl.parallel",
    "lcl.attention",
    "lcl.checkpoints",
    "lcl.evals",
    "lcl.analysis",
    "lcl.report",
    "lcl.policies",
    "lcl.stages",
    "lcl.train",
    "lcl.compile",
)

_CONFIGURABLES: dict[str, config_reader.Configurable] = {}
_LOCK = threading.RLock()


@dataclasses.dataclass
class _Evaluation:
    """One evaluation by gin, from its root's arguments inwards.

    Attributes:
        root: `scope/name` of what is evaluated; it is not called, only its arguments are built.
        kwargs: those arguments.
        made: what functions and classes returned, {id: (name, arguments, result)}.
        error: the refusal that ended the evaluation, in its own words.
    """

    root: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: dict[int, tuple[str, dict[str, Any], Any]] = dataclasses.field(default_factory=dict)
    error: ConfigError | None = None


_EVALUATIONS: list[_Evaluation] = []  # under way now, innermost last; guarded by _LOCK


# ---- what can be configured ---------------------------------------------------------------------


def register(*objects: Callable[..., Any]) -> None:
    """Lets gin files use these frozen dataclasses or functions by their bare names.

    The rooms' own are registered by `load`; call this for an object of your own, in a notebook or
    in a module that a gin file names with `import my.module`. A redefinition replaces.

    Raises:
        ConfigError: if an object of another module already has the name.
    """
    with _LOCK:
        for target in objects:
            _register(target)


def register_rooms() -> None:
    """Registers what the rooms offer: frozen dataclasses in `__all__`, and `CONFIGURABLES`."""
    for room in ROOMS:
        module = importlib.import_module(room)
        functions = tuple(getattr(module, "CONFIGURABLES", ()))
        for name in dict.fromkeys((*module.__all__, *functions)):
            target = getattr(module, name)
            if name in functions or _is_frozen_dataclass(target):
                register(target)


def _is_frozen_dataclass(target: Any) -> bool:
    return (
        inspect.isclass(target)
        and dataclasses.is_dataclass(target)
        and target.__dataclass_params__.frozen  # type: ignore[attr-defined]
    )


def _register(target: Callable[..., Any]) -> None:
    name = target.__name__
    old = _CONFIGURABLES.get(name)
    if old is not None and old.target is target:
        return
    if old is not None and old.target.__module__ != target.__module__:
        raise ConfigError(
            f"two configurables are called {name!r}, in {old.target.__module__} and in "
            f"{target.__module__}: rename one"
        )
    signature = inspect.signature(target)
    entry = config_reader.Configurable(
        name, target, signature.parameters, config_types.hints_of(target)
    )
    with _redefinition() if old is not None else contextlib.nullcontext():
        gin.external_configurable(_gin_function(entry, signature), name=name, module="lcl")
    _CONFIGURABLES[name] = entry


@contextlib.contextmanager
def _redefinition() -> Iterator[None]:
    """gin's permission to replace a configurable of the same name."""
    gin.enter_interactive_mode()
    try:
        yield
    finally:
        gin.exit_interactive_mode()


def _gin_function(
    entry: config_reader.Configurable, signature: inspect.Signature
) -> Callable[..., Any]:
    """What gin calls in place of the object: refusals become one line, the root is not called."""

    def called_by_gin(**kwargs: Any) -> Any:
        evaluation = _EVALUATIONS[-1]
        scope = gin.current_scope_str()
        where = f"{scope}/{entry.name}" if scope else entry.name
        kwargs = {k: config_types.freeze(v, entry.hints.get(k, Any)) for k, v in kwargs.items()}
        try:
            for parameter in entry.missing(kwargs):
                key = f"{where}.{parameter}"
                raise ConfigError(f"{key} is not bound: write {key} = ... or give --gin.{key}=...")
            if where == evaluation.root:
                evaluation.kwargs = kwargs
                return None
            made = entry.target(**kwargs)
        except ConfigError as error:
            evaluation.error = error
            raise
        except ValueError as error:
            evaluation.error = ConfigError(f"{where}: {config_reader.first_line(error)}")
            raise evaluation.error from error
        evaluation.made[id(made)] = (entry.name, entry.defaults | kwargs, made)
        return made

    called_by_gin.__name__ = called_by_gin.__qualname__ = entry.name
    # gin reads only the names of the parameters here; what must be bound, `missing` has said.
    called_by_gin.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(
                kind=inspect.Parameter.VAR_KEYWORD
                if parameter.kind is inspect.Parameter.VAR_KEYWORD
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty,
            )
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        ]
    )
    return called_by_gin


# ---- the configuration --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked configuration; building its objects is repeatable and leaves nothing behind.

    Attributes:
        text: all bindings as gin text, one a line; includes are resolved, overridden lines gone.
    """

    text: str

    def kwargs(self, name: str = "train", **overrides: Any) -> dict[str, Any]:
        """Builds the arguments bound for a configurable.

        Args:
            name: its name, or `scope/name`.
            **overrides: arguments which win over the bound ones.

        Returns:
            The arguments that were bound or given; those left at their defaults are absent.

        Raises:
            ConfigError: a value refused by its object (in the object's words), or one missing.
        """
        return self._evaluate(name, overrides).kwargs

    def train_kwargs(self, **overrides: Any) -> dict[str, Any]:
        """Builds the arguments of `lcl.train.train`."""
        return self.kwargs("train", **overrides)

    def call(self, name: str, **overrides: Any) -> Any:
        """Calls a configurable: `load(files).call("train", run_dir="runs/x")`."""
        return _entry(name).target(**self.kwargs(name, **overrides))

    def operative_text(self, name: str = "train", **overrides: Any) -> str:
        """Every value `name` would be called with, defaults included, as gin text.

        It is a normal form: sorted, free of macros, includes and addresses. Two runs differ
        exactly where their texts do, and loading the text builds equal objects.
        """
        return self.built(name, **overrides)[1]

    def built(
        self,
        name: str = "train",
        change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> tuple[dict[str, Any], str]:
        """Builds the arguments of a configurable, and the text that would build them again.

        Args:
            name: its name, or `scope/name`.
            change: from the arguments to those that are wanted, made of the same objects or parts
                of them (`lcl.baselines`); None = as they are.
            **overrides: as for `kwargs`.

        Returns:
            What `kwargs` and `operative_text` return, after the change.
        """
        evaluation = self._evaluate(name, overrides)
        entry = _entry(name)
        kwargs = evaluation.kwargs if change is None else change(evaluation.kwargs)
        names = {c.target: c.name for c in _CONFIGURABLES.values()}
        text = config_types.normal_form(entry.name, entry.defaults | kwargs, names, evaluation.made)
        return kwargs, text

    def _evaluate(self, name: str, overrides: Mapping[str, Any]) -> _Evaluation:
        entry = _entry(name)
        for key in overrides:
            if key not in entry.parameters:
                hint = config_reader.nearest(key, entry.parameters)
                raise ConfigError(f"{name} has no parameter {key!r}{hint}")
        with _LOCK:
            evaluation = _Evaluation(name)
            gin.clear_config()
            _EVALUATIONS.append(evaluation)
            try:
                gin.parse_config(_for_gin(self.text))
                gin.get_configurable(name)(**overrides)
            except ConfigError:
                assert evaluation.error is not None
                # Not what arrives here: gin has added lines of its own to it.
                raise evaluation.error from evaluation.error.__cause__
            finally:
                _EVALUATIONS.pop()
                gin.clear_config()
        return evaluation


# What gin calls its own; a configurable of ours with such a name must be told apart from it.
_GINS_OWN = re.compile(r"(?<![\w./'\"])(@?(?:\w+/)*)(macro|constant|singleton)(?=[.()])")


def _for_gin(text: str) -> str:
    """The text with `constant` and the like written as `lcl.constant`, where that is ours."""

    def ours(found: re.Match[str]) -> str:
        return f"{found[1]}lcl.{found[2]}" if found[2] in _CONFIGURABLES else found[0]

    return _GINS_OWN.sub(ours, text)


def _entry(name: str) -> config_reader.Configurable:
    bare = name.split("/")[-1]
    if bare not in _CONFIGURABLES:
        hint = config_reader.nearest(bare, _CONFIGURABLES)
        raise ConfigError(f"nothing is called {bare!r}{hint}")
    return _CONFIGURABLES[bare]


def load(gin_files: Sequence[str] = (), bindings: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration; nothing is built yet.

    Args:
        gin_files: paths, from the working directory or from the repository's root; later ones win.
        bindings: `train.seed=1` or `SEED=1`; they win over the files.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: one line, naming the place and the nearest right name.
    """
    register_rooms()
    statements = [s for name in gin_files for s in config_reader.read_file(name)]
    statements += [s for binding in bindings for s in config_reader.read_binding(binding)]
    config_reader.check(statements, _CONFIGURABLES)
    last = {statement.key: statement for statement in statements}
    return Config("".join(f"{statement}\n" for statement in last.values()))
