"""Scores of a store's documents that were made after it: a number each, in one file beside it.

What a corpus knows of its documents when it is prepared is an extra (`Store.extra`). What somebody
finds out later, such as how surprising each is to a reference model (`lcl.evals.perplexity`), lies
beside the split it is of, and a `Subset(by="scores:NAME")` ranks by it:

    <root>/<domain>/train/               the store, as it was
    <root>/<domain>/scores/
        train-reference.npz              values float32[documents], about: JSON

A file is written whole, and belongs to the store whose fingerprint it carries: after `lcl prepare
--force` it is refused rather than read for other documents. Its own fingerprint is a hash of the
numbers and of what made them; plans, streams and run cards hold it, so that a run whose scores were
made anew is another run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcl.data.fingerprints import fingerprint
from lcl.data.store_writer import StoreError
from lcl.data.tokenizers import write_atomically

PREFIX = "scores:"  # of Subset.by
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """A number for each document of a store.

    Attributes:
        name: of the scores.
        values: float32[num_documents].
        about: how they were made: plain JSON values, with "store", the store's fingerprint.
    """

    name: str
    values: np.ndarray
    about: Mapping[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the numbers and of what made them."""
        return fingerprint("scores", dict(self.about), self.values.tobytes())


def scores_path(store: Any, name: str) -> str:
    """Where the scores called `name` of a store lie, or go.

    Raises:
        ValueError: a name that is no name of a file.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"scores name {name!r} must be letters, digits, _ - and . only")
    domain, split = os.path.split(os.path.abspath(store.path))
    return os.path.join(domain, "scores", f"{split}-{name}.npz")


def write_scores(store: Any, name: str, values: np.ndarray, about: Mapping[str, Any]) -> str:
    """Write the scores of a store's documents beside it; a reader sees the old file or the new one.

    Args:
        store: the `Store` they are of.
        name: what to call them.
        values: float [num_documents], finite; kept as float32.
        about: how they were made, in plain JSON values.

    Returns:
        The file's path.

    Raises:
        ValueError: not one finite number a document.
        StoreError: a place that cannot be written to.

    Example:
        >>> import tempfile
        >>> from lcl.data.testing import make_stores
        >>> store = make_stores(tempfile.mkdtemp(), {"en": 6}).open("en")
        >>> _ = write_scores(store, "length", store.lengths, {"made by": "hand"})
        >>> (read_scores(store, "length").values == store.lengths).all()
        np.True_
    """
    path = scores_path(store, name)
    values = np.asarray(values).astype(np.float32)
    if values.shape != (store.num_documents,) or not np.isfinite(values).all():
        raise ValueError(
            f"scores {name!r} of {store.domain!r} must be a finite number for each of its "
            f"{store.num_documents:,} documents, not {values.shape} with "
            f"{int((~np.isfinite(values)).sum())} that are not finite"
        )
    content = io.BytesIO()
    whole = {**about, "store": store.fingerprint}
    np.savez(content, values=values, about=np.array(json.dumps(whole, sort_keys=True)))
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise StoreError(
            f"cannot write scores to {path!r} ({error.strerror}); make its folder writable"
        ) from error
    return path


def read_scores(store: Any, name: str) -> Scores:
    """Read scores that lie beside a store.

    Raises:
        StoreError: there are none of that name (those that are there are named), the file is torn,
            or it is of another store than the one that is there now.
    """
    path = scores_path(store, name)
    try:
        with np.load(path, allow_pickle=False) as file:
            values, about = file["values"], json.loads(str(file["about"]))
    except FileNotFoundError as error:
        known = scores_of(store)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise StoreError(
            f"{store.domain!r} has no scores {name!r}{hint} (there are "
            f"{', '.join(known) or 'none'}; `lcl score RUN --domain {store.domain} --name {name}` "
            "makes them)"
        ) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise StoreError(f"scores {path!r} are torn; remove the file and score again") from error
    if about.get("store") != store.fingerprint or len(values) != store.num_documents:
        raise StoreError(
            f"scores {path!r} are of a store that was prepared before the one that is there now; "
            "score its documents again"
        )
    return Scores(name, values, about)


def scores_of(store: Any) -> list[str]:
    """Names of the scores that lie beside a store, sorted."""
    domain, split = os.path.split(os.path.abspath(store.path))
    try:
        names = os.listdir(os.path.join(domain, "scores"))
    except OSError:
        return []
    first = f"{split}-"
    return sorted(n[len(first) : -4] for n in names if n.startswith(first) and n.endswith(".npz"))
