"""Corpora that are always there: the sources and the documentation of Python's standard library."""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence

from lcl.data.corpora.apt import Package
from lcl.data.sources import Document, Ledger

# Not the library: what is installed into it, tests, and tables that a script wrote.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ pydoc_data lib-dynload".split()
)
_GENERATED = ("generated from 'MAPPINGS", "Automatically generated", "This file was generated")


def source_files() -> Iterator[tuple[str, str]]:
    """Source files of the running Python's standard library, sorted: (path, name in it)."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and "-" not in f]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    yield from sorted((path, os.path.relpath(path, root)) for path in found)


def read_source(path: str, ledger: Ledger) -> str | None:
    """The text of a source file, by its coding cookie; None, and counted, if it is not wanted."""
    if os.path.islink(path):
        ledger.drop("symbolic link")
        return None
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, UnicodeDecodeError):
        ledger.drop("not decodable")
        return None
    except OSError:
        ledger.drop("not readable")
        return None
    if any(mark in text[:2000] for mark in _GENERATED):
        ledger.drop("generated table")
        return None
    return text


def python(packages: Sequence[Package], ledger: Ledger) -> Iterator[Document]:
    """The sources, one document a module."""
    del packages
    for path, name in source_files():
        text = read_source(path, ledger)
        if text is not None:
            # The group of `pydoc` too: a docstring must not be trained on and tested on.
            yield Document(name, text, "standard library", group=f"standard-library/{name}")


def pydoc(packages: Sequence[Package], ledger: Ledger) -> Iterator[Document]:
    """The English documentation: the language reference by topic, the docstrings by module."""
    del packages
    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        name = f"topics/{topic}"
        yield Document(name, text.strip("\n") + "\n", "language reference", group=f"pydoc/{name}")
    for path, name in source_files():
        source = read_source(path, ledger)
        if source is None:
            continue
        try:
            with warnings.catch_warnings():  # Old escapes in old modules.
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            ledger.drop("not parsable")
            continue
        module = name.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
        text = describe(tree, module)
        if not text:
            ledger.drop("no docstring")
            continue
        yield Document(name, text, "docstrings", group=f"standard-library/{name}")


def describe(tree: ast.Module, module: str) -> str:
    r"""The docstrings of a module, in order, each under its signature; "" if there is none.

    >>> print(describe(ast.parse('def add(a, b=1):\n    "Adds."'), "sums"))
    sums
    <BLANKLINE>
    def add(a, b=1)
        Adds.
    """
    parts = list(_describe(tree, ""))
    return "\n\n".join([module, *parts]) if parts else ""


def _describe(node: ast.AST, indent: str) -> Iterator[str]:
    for child in [node, *ast.iter_child_nodes(node)] if isinstance(node, ast.Module) else [node]:
        if isinstance(child, ast.Module):
            doc = ast.get_docstring(child)
            if doc:
                yield doc
        elif isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(child)
            inner = []
            if isinstance(child, ast.ClassDef):
                for member in child.body:
                    inner += list(_describe(member, indent + "    "))
            if doc or inner:
                head = textwrap.indent(_signature(child), indent)
                body = textwrap.indent(inspect.cleandoc(doc), indent + "    ") if doc else ""
                yield "\n\n".join([f"{head}\n{body}" if body else head, *inner])


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind} {node.name}({ast.unparse(node.args)}){result}"
