"""The papers that can be reproduced, by the names of their files: a new file is a new entry.

    lcl/papers/NAME.py     PAPER = Mer()                        --tier cpu: minutes on two cores
                           TINY = Mer(steps=4, ...)             --tier tiny: seconds, for the tests
                           POD = (PodRun("replay", (...)), ...) --tier pod: the paper's own sizes

A file is known by what it assigns, found without importing it: `lcl reproduce --list` needs no JAX.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lcl.papers import code

if TYPE_CHECKING:
    from lcl.papers.paper import Paper

TIERS = ("cpu", "tiny", "pod")
FOLDER = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class PodRun:
    """A run at the paper's size: gin files, laid one over the other.

    Attributes:
      arm: which row of the table.
      gin_files: as `--gin_file`, in order; the first is the whole run.
      bindings: as `--gin.NAME=VALUE`, on top.
    """

    arm: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...] = ()

    def arguments(self) -> str:
        """What follows `lcl train` and `lcl compile`.

        >>> PodRun("plain", ("a.gin", "b.gin"), ("train.seed=1",)).arguments()
        '--gin_file=a.gin --gin_file=b.gin --gin.train.seed=1'
        """
        files = [f"--gin_file={name}" for name in self.gin_files]
        return " ".join([*files, *(f"--gin.{binding}" for binding in self.bindings)])


def names() -> list[str]:
    """The names of all papers, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if code.is_paper(path))


def summary(name: str) -> str:
    """The first line of a paper's file, without importing it."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return text.partition("\n")[0]


def check_name(name: str) -> str:
    """The name, if there is a paper of it; else a ValueError that names the nearest."""
    return nearest("paper", name, names())


def nearest(what: str, name: str, known: Sequence[str]) -> str:
    """`name`, if it is known.

    Raises:
      ValueError: it is not; one line with the nearest known name, and all of them.

    >>> nearest("paper", "mre", ["mer", "cmr"])
    Traceback (most recent call last):
    ValueError: unknown paper 'mre'; did you mean 'mer'? (there are mer, cmr)
    """
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (there are {', '.join(known)})")


def load(name: str, tier: str = "cpu") -> Paper:
    """A paper at the size of a tier, "cpu" or "tiny"."""
    module = _module(name)
    return module.TINY if tier == "tiny" else module.PAPER


def pod_runs(name: str) -> tuple[PodRun, ...]:
    """The runs of a paper at its own size."""
    return tuple(_module(name).POD)


def _module(name: str) -> Any:
    return importlib.import_module(f"lcl.papers.{check_name(name)}")
