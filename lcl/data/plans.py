"""Plans: a domain's layout together with the order in which its rows are used, and a disk cache.

A plan answers two questions by arithmetic. Which row of the layout is the k-th to be used?

    k            0 1 2 3 4 | 5 6 7 8 9 | 10 ...       a layout of R = 5 rows
    epoch        0 0 0 0 0 | 1 1 1 1 1 |  2 ...       k // R
    row          3 0 4 1 2 | 1 4 0 2 3 |  ...         a permutation keyed by the epoch

And how many tokens are in the first k of them (rows differ by their padding)?
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lcl.data.fingerprints import fingerprint
from lcl.data.ordering import named_key, permute
from lcl.data.packing import Layout, Slices, TornLayoutError

_LOG = logging.getLogger(__name__)
_STRIDE = 1024


class PrefixSums:
    """Sums of the first n rows of a table that is computed, not stored.

    Only every 1024th sum is kept, and only as far as anyone has asked: a run that resumes at step t
    pays for the rows before t once, the run that logs every few steps pays for the new rows.
    """

    def __init__(self, width: int, values_fn: Callable[[np.ndarray], np.ndarray]):
        """Args: width: columns; values_fn: maps int64[n] row numbers to int64[n, width]."""
        self._values_fn = values_fn
        self._sums = [np.zeros(width, np.int64)]
        self._lock = threading.Lock()

    def __call__(self, n: int) -> np.ndarray:
        """Return the sum over rows 0 .. n - 1, int64[width]."""
        whole, rest = divmod(int(n), _STRIDE)
        with self._lock:
            while len(self._sums) <= whole:
                begin = (len(self._sums) - 1) * _STRIDE
                values = self._values_fn(np.arange(begin, begin + _STRIDE))
                self._sums.append(self._sums[-1] + values.sum(axis=0))
        if not rest:
            return self._sums[whole]
        values = self._values_fn(np.arange(whole * _STRIDE, n))
        return self._sums[whole] + values.sum(axis=0)


class Plan:
    """One domain's rows at one length, and the order of their use.

    Attributes:
        name: everything that decides the plan (strings and integers); names its keys.
        domain: index of the domain in the stream.
        store: the domain's store.
        layout: the rows; at least one.
    """

    def __init__(self, name: Sequence[Any], domain: int, store: Any, layout: Layout):
        assert layout.num_rows, "an empty layout has no k-th row"
        self.name = tuple(name)
        self.domain = domain
        self.store = store
        self.layout = layout
        self._row_key = functools.lru_cache(maxsize=64)(lambda e: named_key("rows", *self.name, e))
        self._epoch_sums = functools.lru_cache(maxsize=4)(
            lambda epoch: PrefixSums(
                1, lambda k: self.layout.tokens_in(self._rows_of_epoch(epoch, k))[:, None]
            )
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return self.layout.num_rows

    def row_key(self, epoch: int) -> int:
        """Return the key of an epoch's permutation."""
        return self._row_key(epoch)

    def _rows_of_epoch(self, epoch: int, place: np.ndarray) -> np.ndarray:
        return permute(place, self.num_rows, self.row_key(epoch))

    def tokens_in_first(self, k: int) -> int:
        """Count the transitions in the first k rows used, padding apart; exact."""
        epochs, rest = divmod(int(k), self.num_rows)
        tokens = epochs * self.layout.num_tokens
        return tokens + int(self._epoch_sums(epochs)(rest)[0]) if rest else tokens

    def seen(self, k: int) -> Slices:
        """Return the slices of the rows that are among the first k used, each row once."""
        if k >= self.num_rows:
            return self.layout.rows(np.arange(self.num_rows))
        return self.layout.rows(np.sort(self._rows_of_epoch(0, np.arange(k))))


def rows_at(
    plans: Sequence[Plan], plan: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look up the k-th row used of several plans at once.

    Args:
        plans: the plans.
        plan: int64[n], index into `plans`.
        k: int64[n], which use, >= 0.

    Returns:
        (epoch, row of the layout), int64[n] each.
    """
    size = np.array([p.num_rows for p in plans])[plan]
    epoch, place = np.divmod(k, size)
    keys = [plans[p].row_key(e) for p, e in zip(plan.tolist(), epoch.tolist(), strict=True)]
    return epoch, permute(place, size, np.array(keys, np.uint64))


def cached_layout(
    plan_dir: str | os.PathLike[str] | None, name: Sequence[Any], build_fn: Callable[[], Layout]
) -> Layout:
    """Return the layout that `name` decides: from the disk if it is there, else built (and kept).

    Any number of processes may do this at once: each that finds nothing builds the same layout, and
    the first to finish publishes it. A torn entry is reported, removed and built again.

    Args:
        plan_dir: the cache's directory; None keeps layouts in memory only.
        name: everything that decides the layout, the store's fingerprint included.
        build_fn: makes it.

    Returns:
        The layout, memory-mapped when there is a cache.
    """
    if plan_dir is None:
        return build_fn()
    path = os.path.join(os.fspath(plan_dir), fingerprint("layout", *name))
    try:
        return Layout.load(path)
    except FileNotFoundError:
        pass
    except TornLayoutError as error:
        _LOG.warning("%s: building it again", str(error).removesuffix("; delete it"))
        torn = f"{path}.torn-{os.getpid()}"
        with contextlib.suppress(OSError):  # another process was faster; or `save` will complain
            os.rename(path, torn)  # at once, so that no other process reads half of it
        shutil.rmtree(torn, ignore_errors=True)
    layout = build_fn()
    try:
        layout.save(path)
    except OSError as error:
        raise ValueError(
            f"cannot keep plans under {os.fspath(plan_dir)!r} ({error.strerror}); give plan_dir a "
            "writable directory with room, or None"
        ) from error
    return Layout.load(path)
