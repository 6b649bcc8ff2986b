"""Scores of a corpus's documents under a run's model: `lcl score RUN --domain NAME`.

What is computed stands in `lcl.evals.perplexity`, where it is kept in `lcl.data.scores`; this
restores a checkpoint of the reference run and puts the scoring on its mesh.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging as logs
import os
from collections.abc import Sequence
from typing import Any

from lcl.assembly import assemble
from lcl.checkpoints import Checkpointer
from lcl.checkpoints.digest import state_digest
from lcl.data.scores import Scores, read_scores, scores_of, write_scores
from lcl.describe import describe
from lcl.evals.perplexity import score_documents
from lcl.parallel import rules

__all__ = ["score"]

log = logs.getLogger("lcl")


def score(
    *,
    domains: Sequence[str],
    name: str = "reference",
    split: str = "train",
    step: int | None = None,
    **settings: Any,
) -> dict[str, Scores]:
    """Scores every document of some domains by a run's checkpoint, nats/token; see the two rooms.

    Args:
      domains: which; they need not be the run's own, but must share its tokenizer.
      name: of the scores; `Subset(by="scores:NAME", best="low")` reads the likeliest documents.
      split: "train", or "heldout" to look at them.
      step: of the checkpoint; None = the newest.
      **settings: the arguments of the reference run's `train`. Rows and batches are those of its
        evaluation.

    Returns:
      {domain: Scores}, which lie beside the stores. Where the same scores (same store, parameters,
      model, row length) lie there already they are left alone.

    Raises:
      ValueError: an unknown domain, no such checkpoint, a place that cannot be written to.
    """
    run = assemble(**{word: settings[word] for word in inspect.signature(assemble).parameters})
    evaluation = settings["evaluation"]
    stores = {domain: run.data.open(domain, split) for domain in domains}
    with Checkpointer(settings["run_dir"], settings["checkpoint"], read_only=True) as checkpoints:
        restored = checkpoints.restore(run.abstract_state, step)
    where = run.span_ending_at(restored.step) or run.span_at(restored.step)
    assert where is not None
    params = run.eval_params(restored.state)
    digest = json.dumps(state_digest(params), sort_keys=True).encode()
    about = {
        "measure": "nats_per_token",
        "parameters": hashlib.blake2b(digest, digest_size=16).hexdigest(),
        "model": {k: str(v) for k, v in describe(run.model_of(where)).items()},
        "sequence_length": evaluation.sequence_length,
        "run": os.path.basename(os.path.normpath(os.fspath(settings["run_dir"]))),
        "step": restored.step,
    }
    found = {}
    for domain, store in stores.items():
        old = read_scores(store, name) if name in scores_of(store) else None
        if old is not None and dict(old.about) == {**about, "store": store.fingerprint}:
            log.info("the scores %r of %s are there already", name, domain)
            found[domain] = old
            continue
        values = score_documents(
            store,
            lambda num_sources: run.eval_step(where, num_sources),
            params,
            sequence_length=evaluation.sequence_length,
            batch_size=evaluation.batch_size,
            put=lambda batch: rules.put_batch(run.lay_out(batch), run.mesh),
        )
        write_scores(store, name, values, about)
        found[domain] = read_scores(store, name)
    return found
