"""How surprising each document is to a model: its mean loss in nats a token, one number each.

A reference model scores every document of a store once; a stage then reads the ones it finds least
surprising (the quality subset of arXiv:2406.14833, which took a reference model of the target's own
kind of text; `Subset(by="scores:NAME", best="low")` reads them, `lcl.data.scores` keeps them).

    documents      d0 ---------      d1 ----      d2 -------------------     (transitions)
    rows           |d2 d2 d2 d2 d2|d2 d2 d0 d0 d0|d0 d1 d1|          packed as for training, masked
    places         | 0  0  0  0  0| 0  0  1  1  1| 1  2  2|          of the document in the batch
    the step       sums of nats by place, the same program for every batch
    score          sum over a document's pieces / its transitions     nats/token; exp = perplexity

A document longer than a row is scored in pieces, each of which begins without what stood before it:
its first tokens are a little more surprising than they would be in one long row. So the length of
the rows is part of the number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcl.evals.heldout import EvalStep


def score_documents(
    store: Any,
    eval_step_fn: Callable[[int], EvalStep],
    params: Any,
    *,
    sequence_length: int,
    batch_size: int,
    put: Callable[[Any], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The mean loss of each document of a store under a model.

    Args:
        store: a `Store`.
        eval_step_fn: num_sources -> the held-out forward, (params, batch) -> the sums by source
            "nll_sum_by_source" and "weight_by_source", float32[num_sources] on the device. Asked
            once.
        params: handed on untouched.
        sequence_length: T of the rows, >= 2.
        batch_size: rows of a batch.
        put: applied to each batch before the step, to place it on a mesh.
        progress: called with (batches done, all batches).

    Returns:
        float32[num_documents], nats/token. A document without a transition has the mean of the
        others: no row holds any of it, so nothing can be read there.

    Raises:
        ValueError: a store without a token to score; a step that scored another number of tokens
            than a document has.

    Example:
        >>> import tempfile
        >>> from lcl.data.testing import make_stores
        >>> store = make_stores(tempfile.mkdtemp(), {"en": 8}).open("en")
        >>> def spaces(num_sources):  # a "model" that finds a space (32) easy and all else hard
        ...     def step(params, batch):
        ...         nll = np.where(batch.targets == 32, 1.0, 4.0) * batch.loss_weights
        ...         place = batch.source_ids.ravel()
        ...         return {
        ...             "nll_sum_by_source": np.bincount(place, nll.ravel(), num_sources),
        ...             "weight_by_source": np.bincount(
        ...                 place, batch.loss_weights.ravel(), num_sources
        ...             ),
        ...         }
        ...
        ...     return step
        >>> scores = score_documents(store, spaces, None, sequence_length=64, batch_size=2)
        >>> share = np.mean(store.document(0)[1:] == 32)
        >>> bool(np.isclose(scores[0], 1.0 * share + 4.0 * (1 - share)))
        True
    """
    from lcl.data.batch import gather_rows, layout_group
    from lcl.data.packing import pack

    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    lengths = np.maximum(np.asarray(store.lengths, np.int64) - 1, 0)
    if not lengths.sum():
        raise ValueError(f"{store.domain!r} has no token to score; prepare more documents of it")
    layout = pack(lengths, sequence_length)
    batches = [
        np.arange(first, min(first + batch_size, layout.num_rows))
        for first in range(0, layout.num_rows, batch_size)
    ]
    documents = [np.unique(layout.rows(rows).document) for rows in batches]
    num_places = max(len(some) for some in documents)
    step = eval_step_fn(num_places)
    nll, weight = np.zeros(len(lengths)), np.zeros(len(lengths))

    def add(pending: tuple[np.ndarray, Mapping[str, Any]]) -> None:
        some, sums = pending
        nll[some] += np.asarray(sums["nll_sum_by_source"], np.float64)[: len(some)]
        weight[some] += np.asarray(sums["weight_by_source"], np.float64)[: len(some)]

    waiting: tuple[np.ndarray, Mapping[str, Any]] | None = None
    for done, (rows, some) in enumerate(zip(batches, documents, strict=True)):
        group = layout_group(store, layout, rows, np.arange(len(rows)), 0)
        batch = gather_rows([group], batch_size, sequence_length)
        batch = batch._replace(source_ids=_places(layout, rows, some, batch))
        sums = step(params, put(batch) if put else batch)
        if waiting is not None:
            add(waiting)  # while the device works on the next one
        waiting = (some, sums)
        if progress is not None:
            progress(done + 1, len(batches))
    assert waiting is not None
    add(waiting)
    wrong = np.flatnonzero(np.abs(weight - lengths) > 1e-3 + 1e-5 * lengths)
    if len(wrong):
        raise ValueError(
            f"document {wrong[0]} of {store.domain!r} has {lengths[wrong[0]]:,} tokens to score, "
            f"but {weight[wrong[0]]:g} were: the objective must count every token once"
        )
    scored = lengths > 0
    scores = np.full(len(lengths), nll.sum() / weight.sum())
    scores[scored] = nll[scored] / lengths[scored]
    return scores.astype(np.float32)


def _places(layout: Any, rows: np.ndarray, documents: np.ndarray, batch: Any) -> np.ndarray:
    """int32[B, T]: each cell's document as its place among `documents`; 0 at padding."""
    slices = layout.rows(rows)
    number = np.searchsorted(documents, slices.document)
    places = np.zeros(batch.tokens.shape, np.int32)
    places[batch.segment_ids > 0] = np.repeat(number, slices.length)  # both go row by row
    return places
