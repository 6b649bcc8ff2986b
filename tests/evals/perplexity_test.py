"""Documents' scores against a model whose loss can be counted by hand, and against a real one."""

from __future__ import annotations

import doctest

import jax
import numpy as np
import pytest

import lcl.evals.perplexity
from lcl.data import Data
from lcl.data.testing import make_stores
from lcl.evals.perplexity import score_documents
from lcl.models import Decoder
from lcl.models.decoder import init_params
from lcl.objectives import NextToken
from lcl.programs import jit_eval_step
from tests import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("stores"), {"a": 30}, mean_words=8).open("a")


def by_target(num_sources):
    """A model whose loss at each token is a hundredth of the target's number."""

    def step(params, batch):
        place = batch.source_ids.ravel()
        nll = (batch.targets * batch.loss_weights / 100).ravel()
        sums = [np.bincount(place, x, num_sources) for x in (nll, batch.loss_weights.ravel())]
        return {"nll_sum_by_source": sums[0], "weight_by_source": sums[1]}

    return step


@pytest.mark.parametrize(("length", "rows"), [(16, 3), (64, 4), (4096, 1), (2, 7)])
def test_each_document_has_the_mean_of_its_own_tokens(store, length, rows):
    """Whatever the rows: pieces, several documents of a row, a last batch that isn't full."""
    scores = score_documents(store, by_target, None, sequence_length=length, batch_size=rows)
    want = [store.document(i)[1:].mean() / 100 for i in range(store.num_documents)]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, want, rtol=1e-6)


def test_a_real_model_scores_a_document_as_by_itself(store):
    model = tiny.MODEL
    params = init_params(model, jax.random.key(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)

    def eval_step_fn(num_sources):
        step = jit_eval_step(model, NextToken(), num_sources)

        def run(params, batch):
            with jax.set_mesh(mesh):
                return step(params, batch)

        return run

    scores = score_documents(store, eval_step_fn, params, sequence_length=64, batch_size=4)
    short = [i for i, n in enumerate(store.lengths.tolist()) if n <= 65][:3]
    assert len(short) == 3
    for i in short:
        tokens = store.document(i).astype(np.int32)
        logits = Decoder(model).apply({"params": params}, tokens[None, :-1])
        logs = jax.nn.log_softmax(logits[0])
        want = -np.mean([logs[t, token] for t, token in enumerate(tokens[1:])])
        np.testing.assert_allclose(scores[i], want, rtol=2e-3)  # bfloat16 compute


MESH_AXES = ("data", "fsdp", "context", "tensor")


def test_progress_is_told(store):
    told = []
    score_documents(
        store,
        by_target,
        None,
        sequence_length=64,
        batch_size=4,
        progress=lambda done, all_: told.append((done, all_)),
    )
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))


def test_a_step_that_loses_tokens_is_an_error(store):
    def lossy(num_sources):
        step = by_target(num_sources)

        def half(params, batch):
            return {name: value / 2 for name, value in step(params, batch).items()}

        return half

    with pytest.raises(ValueError, match="document 0 of 'a' has .* tokens to score, but .* were"):
        score_documents(store, lossy, None, sequence_length=64, batch_size=4)
    with pytest.raises(ValueError, match="sequence_length is 1; give at least 2"):
        score_documents(store, by_target, None, sequence_length=1, batch_size=4)


def test_scores_choose_what_a_reference_model_finds_likely(tmp_path):
    """The model likes low byte numbers, so the part is of documents with few high letters."""
    from lcl.data import Mixture, StageData, Subset, build_stream, write_scores

    data = make_stores(tmp_path, {"a": 60}, mean_words=8)
    store = Data(str(tmp_path)).open("a")
    scores = score_documents(store, by_target, None, sequence_length=64, batch_size=4)
    write_scores(store, "low", scores, {"made by": "hand"})
    part = Subset(Mixture({"a": 1}), "a", by="scores:low", best="low", share=0.25)
    stream = build_stream(data, [("x", StageData(part, 64, 4), 12)], seed=0)
    read = {doc for t in range(12) for row in stream.rows(t) for doc, _, _ in row.slices}
    means = {int(n): store.document(i)[1:].mean() for i, n in enumerate(store.document_ids)}
    best = sorted(means, key=lambda n: means[n])[: store.num_documents // 4]
    assert read == set(best)


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.evals.perplexity).failed == 0
