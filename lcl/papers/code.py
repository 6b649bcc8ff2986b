"""The code that decides a run's numbers, as one hash: what a cached result was made by.

    lcl/**/*.py  --parse-->  syntax trees without docstrings  --hash-->  "3f9c..."
    minus what only shows, launches or decides about claims

A comment or a docstring may be mended without running a grid of minutes anew; anything else in a
room that computes may not. What is left out below can change no number of a run: when in doubt, a
file is in. The versions of the libraries that compute are part of the hash as well.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

LCL = pathlib.Path(__file__).resolve().parents[1]

# Rooms and files which show, launch or configure: a run's arguments are in its other hash.
_DECIDES_NOTHING = (
    *("commands", "report", "main.py", "config.py", "config_reader.py", "config_types.py"),
    *("compile.py", "files.py", "preemption.py", "recorder.py", "describe.py"),
    *("parallel/ahead_of_time.py", "parallel/compile_report.py", "parallel/memory_table.py"),
    *("parallel/roofline.py", "parallel/topologies.py", "parallel/chips.py"),
    *("papers/claims.py", "papers/code.py", "papers/figures.py", "papers/paper.py"),
    *("papers/registry.py", "papers/__init__.py"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@functools.cache
def code_hash(root: pathlib.Path = LCL) -> str:
    """The hash of the code that computes, read once a process: its files may change meanwhile.

    Args:
      root: the package's folder.

    Returns:
      32 hexadecimal digits. A paper's own file is not in it: what it decides is in the arguments of
      its runs, and a measure or function that it defines is hashed with the run that uses it.
    """
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(_DECIDES_NOTHING) or is_paper(path):
            continue
        digest.update(f"{name} {file_hash(path)}\n".encode())
    for package, version in sorted(versions().items()):
        digest.update(f"{package} {version}\n".encode())
    return digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that compute."""
    found = {"python": "{}.{}".format(*sys.version_info[:2])}
    return found | {package: importlib.metadata.version(package) for package in _PACKAGES}


@functools.cache
def file_hash(path: pathlib.Path) -> str:
    """The hash of a file's code, without comments and docstrings."""
    return source_hash(path.read_text())


def source_hash(source: str) -> str:
    """The hash of what a source does, whatever it says about itself.

    >>> source_hash("x = 1  # one") == source_hash("x = 1")
    True
    >>> source_hash("x = 1") == source_hash("x = 2")
    False
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:32]


def module_hash(module: str) -> str | None:
    """The hash of one of our modules by its name; None for a module that is not ours."""
    first, _, rest = module.partition(".")
    path = LCL / (rest.replace(".", "/") + ".py")
    return file_hash(path) if first == "lcl" and rest and path.exists() else None


@functools.cache
def is_paper(path: pathlib.Path) -> bool:
    """Whether a file declares a paper: `PAPER = ...` at its top level, in lcl/papers."""
    if path.parent.name != "papers" or "PAPER" not in (text := path.read_text()):
        return False
    return any(
        isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "PAPER" for target in node.targets)
        for node in ast.parse(text).body
    )


def keep_store(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether a generated store is there and was made by these settings; another one is removed.

    Args:
      path: of the store.
      settings: as given to its `StoreWriter`; with the hash of the code that generates it.
    """
    meta = pathlib.Path(path) / "meta.json"
    if not meta.exists():
        return False
    if json.loads(meta.read_text())["settings"] == json.loads(json.dumps(dict(settings))):
        return True
    shutil.rmtree(path)
    return False
