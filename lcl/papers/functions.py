"""A corpus of natural documents of very different lengths: the functions of Python's library.

    standard library -> modules -> one document a function or method, as it is written, dedented
                        a module's functions are all trained on or all held out

The text is always there, and lengths are spread over three orders of magnitude (bytes, Python
3.11: 10% below 70, half below 250, 10% above 1,100, the longest 17,000), which is what a method
about document lengths needs. Repeated functions count once.
"""

from __future__ import annotations

import ast
import os
import pathlib
import textwrap
import warnings
from collections.abc import Iterator

import numpy as np

from lcl.data import Batch, Data, Store, StoreWriter
from lcl.data.corpora.standard_library import read_source, source_files
from lcl.data.ordering import named_key, shuffle_with_key
from lcl.data.sources import Ledger
from lcl.data.tokenizers import ByteTokenizer
from lcl.papers import code

DOMAIN = "functions"
HELDOUT_SHARE = 0.1


def functions_of(source: str) -> Iterator[str]:
    r"""The functions and methods of a module in the order of their lines, decorators included.

    A function inside a function is part of it, not another document.

    >>> list(functions_of("class A:\n    def f(self):\n        return 1\n\nx = 2\n"))
    ['def f(self):\n    return 1\n']
    """
    with warnings.catch_warnings():  # Old escapes in old modules.
        warnings.simplefilter("ignore")
        try:
            todo: list[ast.stmt] = list(ast.parse(source).body)
        except (SyntaxError, ValueError):
            return
    lines = source.splitlines(keepends=True)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.ClassDef):
            todo = [*node.body, *todo]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))


def write(root: str | os.PathLike[str], limit_modules: int | None = None) -> Data:
    """Writes both splits as stores under `root`, unless they are there, and opens it.

    Args:
      root: directory to fill.
      limit_modules: only so many modules, for a test; None = all.
    """
    root = os.fspath(root)
    settings = {"limit_modules": limit_modules, "code": code.file_hash(pathlib.Path(__file__))}
    paths = [os.path.join(root, DOMAIN, split) for split in ("train", "heldout")]
    missing = [path for path in paths if not code.keep_store(path, settings)]
    if not missing:
        return Data(root)
    seen: set[str] = set()
    texts: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    for path, name in list(source_files())[:limit_modules]:
        source = read_source(path, Ledger())
        heldout = named_key("held out", name) / 2**64 < HELDOUT_SHARE
        for text in functions_of(source or ""):
            if text not in seen:
                seen.add(text)
                texts["heldout" if heldout else "train"].append((text, name))
    for path, split in zip(paths, ("train", "heldout"), strict=True):
        if path not in missing:
            continue
        with StoreWriter(
            path,
            tokenizer=ByteTokenizer(),
            domain=DOMAIN,
            split=split,
            licence="PSF-2.0",
            settings=settings,
        ) as writer:
            for number, (text, name) in enumerate(texts[split]):
                writer.add(text, document_id=number, source=name)
    return Data(root)


def position_marks(sequence_length: int) -> list[str]:
    """Names of the stretches of positions in which losses are told apart, doubling.

    >>> position_marks(256)
    ['0-31', '32-63', '64-127', '128-255']
    """
    edges = _edges(sequence_length)
    return [f"{a}-{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _edges(sequence_length: int) -> list[int]:
    edges = [0]
    step = min(32, sequence_length)
    while step <= sequence_length:
        edges.append(step)
        step *= 2
    if edges[-1] != sequence_length:
        edges.append(sequence_length)
    return edges


def natural_batches(
    store: Store, *, num_documents: int, sequence_length: int, batch_size: int
) -> list[Batch]:
    """Held-out documents as they are: one a row from its beginning, nothing before it.

        row 0   def f(self): ...  .......     source_ids: the stretch of each position,
        row 1   def g(a, b): ...  (cut at T)               0 0 1 1 2 2 2 2 ...

    Args:
      store: the held-out split.
      num_documents: how many, by a keyed order of the store.
      sequence_length: T; a longer document is scored up to it.
      batch_size: rows of a batch.

    Returns:
      Batches whose source_ids are indices into `position_marks(sequence_length)`.
    """
    order = shuffle_with_key(store.num_documents, named_key("natural documents", bits=128))
    chosen = order[: min(num_documents, store.num_documents)]
    stretch = np.searchsorted(_edges(sequence_length)[1:], np.arange(sequence_length), side="right")
    batches = []
    for begin in range(0, len(chosen), batch_size):
        shape = (batch_size, sequence_length)
        tokens, targets, segments, positions, sources = np.zeros((5, *shape), np.int32)
        for i, document in enumerate(chosen[begin : begin + batch_size].tolist()):
            stored = np.asarray(store.document(document)[: sequence_length + 1], np.int32)
            size = len(stored) - 1
            tokens[i, :size], targets[i, :size] = stored[:-1], stored[1:]
            segments[i, :size] = 1
            positions[i, :size] = np.arange(size)
            sources[i, :size] = stretch[:size]
        batches.append(
            Batch(tokens, targets, segments, positions, segments.astype(np.float32), sources)
        )
    return batches
