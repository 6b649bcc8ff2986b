"""Arrays that take long to make: made block by block, kept as they grow, resumed after a kill.

    <cache_dir>/<key>.partial/    while it is made: the arrays; how many rows they have is in
                                  done.json
    <cache_dir>/<key>/            when it is whole: the arrays, their digests in meta.json

The key is a hash of everything that decides the content, so whoever finds a directory under it has
what they would have made. A process that is killed loses the block it was at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.fingerprints import fingerprint, new_digest

Arrays = dict[str, np.ndarray]
# Name -> (shape of one row, dtype).
Fields = Mapping[str, tuple[tuple[int, ...], Any]]
# How many rows there are -> the blocks that follow, each one array a field.
MakeFn = Callable[[int], Iterable[Sequence[np.ndarray]]]

_LOG = logging.getLogger(__name__)


def cached_rows(
    cache_dir: str | os.PathLike[str] | None,
    name: Sequence[Any],
    num_rows: int,
    fields_fn: Callable[[], Fields],
    make_fn: MakeFn,
    *,
    title: str = "",
) -> Arrays:
    """Return arrays of `num_rows` rows: from the disk if they are there, else made (and kept).

    Args:
        cache_dir: where; None keeps them in memory only.
        name: everything that decides the content, as plain values.
        num_rows: N.
        fields_fn: tells name -> (shape of a row, dtype), in the order in which `make_fn` gives
            them; asked only if nothing is on the disk.
        make_fn: given how many rows there are already, yields the blocks that follow.
        title: of the progress bar (shown on a terminal).

    Returns:
        {name: array[N, ...]}, read-only and memory-mapped when there is a cache.

    Example:
        >>> make = lambda start: [[np.arange(start, 3)]]
        >>> cached_rows(None, ["x"], 3, lambda: {"a": ((), np.int64)}, make)["a"].tolist()
        [0, 1, 2]
    """
    if cache_dir is None:
        fields = fields_fn().items()
        arrays = {key: np.zeros((num_rows, *shape), dtype) for key, (shape, dtype) in fields}
        for _ in _fill(arrays, 0, make_fn, title):
            pass
        return arrays
    path = os.path.join(os.fspath(cache_dir), fingerprint("rows", *name))
    found = _load(path)
    if found is not None:
        return found
    try:
        os.makedirs(os.fspath(cache_dir), exist_ok=True)
        with _alone(path):
            found = _load(path)  # another process may have finished meanwhile
            if found is None:
                _make(path, num_rows, fields_fn(), make_fn, title)
    except OSError as error:
        raise ValueError(
            f"cannot keep neighbours under {os.fspath(cache_dir)!r} ({error.strerror}); give a "
            "writable directory with room, or None"
        ) from error
    found = _load(path) if found is None else found
    assert found is not None
    return found


def _fill(arrays: Arrays, start: int, make_fn: MakeFn, title: str) -> Iterator[int]:
    """Write the blocks to their places; yields the number of rows that are in after each."""
    import tqdm

    num_rows = len(next(iter(arrays.values())))
    if start >= num_rows:
        return
    bar = tqdm.tqdm(
        total=num_rows,
        initial=start,
        desc=title,
        unit=" documents",
        disable=None if title else True,
        leave=False,
        dynamic_ncols=True,
    )
    with bar:
        for block in make_fn(start):
            for array, rows in zip(arrays.values(), block, strict=True):
                array[start : start + len(rows)] = rows
            start += len(block[0])
            bar.update(len(block[0]))
            yield start
    assert start == num_rows, f"{title or 'make_fn'} gave {start} rows, not {num_rows}"


def _make(
    path: str,
    num_rows: int,
    fields: Fields,
    make_fn: MakeFn,
    title: str,
) -> None:
    partial = f"{path}.partial"
    arrays, start = _reopen(partial, num_rows, fields)
    if start:
        _LOG.info("%s: going on after %d of %d documents", title or path, start, num_rows)
    for done in _fill(arrays, start, make_fn, title):
        for array in arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        _write_json(os.path.join(partial, "done.json"), {"rows": done})
    digest = {key: _digest(array) for key, array in arrays.items()}
    del arrays
    _write_json(os.path.join(partial, "meta.json"), digest)
    os.rename(partial, path)


def _reopen(partial: str, num_rows: int, fields: Fields) -> tuple[Arrays, int]:
    """The growing arrays and how many rows they have; new ones if what is there is no good."""
    try:
        with open(os.path.join(partial, "done.json"), encoding="utf-8") as file:
            start = int(json.load(file)["rows"])
        arrays = {k: np.load(os.path.join(partial, f"{k}.npy"), mmap_mode="r+") for k in fields}
        for key, (shape, dtype) in fields.items():
            if arrays[key].shape != (num_rows, *shape) or arrays[key].dtype != dtype:
                raise ValueError(key)
        return arrays, start
    except (OSError, ValueError, KeyError):
        shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    arrays = {}
    for key, (shape, dtype) in fields.items():
        file_path, full = os.path.join(partial, f"{key}.npy"), (num_rows, *shape)
        if num_rows:
            arrays[key] = np.lib.format.open_memmap(file_path, "w+", dtype=dtype, shape=full)
        else:  # nothing to map
            arrays[key] = np.zeros(full, dtype)
            np.save(file_path, arrays[key])
    return arrays, 0


def _load(path: str) -> Arrays | None:
    """The finished arrays, or None; torn ones are said, removed and None."""
    if not os.path.isdir(path):
        return None
    try:
        with open(os.path.join(path, "meta.json"), encoding="utf-8") as file:
            digest = json.load(file)
        arrays = {}
        for key in digest:
            file_path = os.path.join(path, f"{key}.npy")
            mapped = os.path.getsize(file_path) > 128 and np.load(file_path, mmap_mode="r").size
            arrays[key] = np.load(file_path, mmap_mode="r" if mapped else None)
        if {key: _digest(array) for key, array in arrays.items()} == digest:
            return arrays
    except (OSError, ValueError):
        pass
    _LOG.warning("%s is torn: making it again", path)
    shutil.rmtree(path, ignore_errors=True)
    return None


def _digest(array: np.ndarray) -> str:
    digest = new_digest()
    for first in range(0, len(array), 65536):
        digest.update(np.ascontiguousarray(array[first : first + 65536]).tobytes())
    return digest.hexdigest()


def _write_json(path: str, value: Any) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """One process at a time makes it; the others wait, and find it made."""
    import fcntl

    with open(f"{path}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
