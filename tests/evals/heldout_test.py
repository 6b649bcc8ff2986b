"""Held-out evaluation: sums, units, bytes and the batches they run on."""

from __future__ import annotations

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcl.evals.heldout
from lcl.data.testing import make_stores
from lcl.evals import EvalBatches, HeldOut, evaluate, summarise
from lcl.parallel.run_ahead import SMALL_PROGRAMS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("stores"), {"aa": 60, "bb": 60})


@pytest.fixture(scope="module")
def batches(data):
    held_out = HeldOut(rows_per_domain=24, sequence_length=256, batch_size=4)
    return held_out.batches(data, ["aa", "bb"])


@jax.jit
def uniform_step(params, batch):
    """A model that gives every one of 258 tokens the same probability."""
    nll = math.log(258) * batch.loss_weights * params
    source = jax.nn.one_hot(batch.source_ids, 4)
    return {
        "nll_sum_by_source": jnp.einsum("bt,bts->s", nll, source),
        "weight_by_source": jnp.einsum("bt,bts->s", batch.loss_weights, source),
        "weight": batch.loss_weights.sum(),
    }


def test_a_uniform_model_has_the_loss_of_its_vocabulary_in_every_domain(batches):
    results = evaluate(uniform_step, jnp.float32(1), batches)
    assert set(results) == {"aa", "bb"}
    for domain, line in results.items():
        assert line["nats_per_token"] == pytest.approx(math.log(258), rel=1e-5)
        assert line["tokens"] == sum(int(b.loss_weights.sum()) for b in batches[domain])
        assert isinstance(line["tokens"], int) and isinstance(line["bytes"], int)
        want = line["nats_per_token"] * line["tokens"] / math.log(2) / line["bytes"]
        assert line["bits_per_byte"] == pytest.approx(want)


def test_with_bytes_as_tokens_only_the_ends_of_documents_have_no_byte(data, batches):
    eos = data.tokenizer().eos_id
    for domain, some in batches.items():
        targets = np.concatenate([b.targets[b.loss_weights > 0] for b in some])
        assert batches.num_bytes[domain] == batches.tokens[domain] - int((targets == eos).sum())
        assert batches.num_bytes[domain] < batches.tokens[domain]


def test_one_shape_and_one_compilation_for_every_domain(batches):
    traced = []

    @jax.jit
    def step(params, batch):
        traced.append(batch.tokens.shape)
        return uniform_step(params, batch)

    evaluate(step, jnp.float32(1), batches)
    assert traced == [(4, 256)]


def test_the_rows_are_the_same_on_every_call(data, batches):
    again = HeldOut(rows_per_domain=24, sequence_length=256, batch_size=4).batches(
        data, ["aa", "bb"]
    )
    for domain in batches:
        for one, two in zip(batches[domain], again[domain], strict=True):
            np.testing.assert_array_equal(one.tokens, two.tokens)


def test_source_ids_are_the_places_in_the_runs_domains(data):
    held_out = HeldOut(rows_per_domain=2, sequence_length=32, batch_size=2, domains=["bb", "aa"])
    batches = held_out.batches(data, ["aa", "bb"])
    assert list(batches) == ["bb", "aa"]
    real = batches["bb"][0].loss_weights > 0
    assert set(batches["bb"][0].source_ids[real].tolist()) == {1}


def test_a_domain_no_stage_trains_can_be_watched(data):
    held_out = HeldOut(rows_per_domain=2, sequence_length=32, batch_size=2, domains=["aa", "bb"])
    assert set(evaluate(uniform_step, jnp.float32(1), held_out.batches(data, ["aa"]))) == {
        "aa",
        "bb",
    }


def test_put_places_each_batch(batches):
    seen = []
    evaluate(
        uniform_step,
        jnp.float32(1),
        batches.with_put(lambda b: seen.append(1) or jax.device_put(b)),
    )
    assert len(seen) == sum(len(batches[d]) for d in batches)


def test_under_a_transfer_guard(batches):
    params = jnp.float32(1)
    placed = batches.with_put(jax.device_put)
    with jax.transfer_guard("disallow"):
        evaluate(uniform_step, params, placed)


def test_sums_are_weighted_and_float64():
    rows = [
        (np.array([[0, 1, 1]]), np.array([[1.0, 1.0, 0.0]], np.float32)),
        (np.array([[1, 1, 1]]), np.array([[1.0, 0.0, 0.0]], np.float32)),
    ]
    batches = EvalBatches({"en": [_Rows(*r) for r in rows]}, token_num_bytes=np.array([0, 4]))
    sums = iter([(1.0, 2.0), (2e-8, 1.0)])  # the second would vanish beside 1.0 in float32

    def step(_params, _batch):
        nll, weight = next(sums)
        return {
            "nll_sum_by_source": np.array([nll], np.float32),
            "weight_by_source": np.array([weight], np.float32),
        }

    line = evaluate(step, None, batches)["en"]
    assert line["tokens"] == 3 and line["bytes"] == 8
    assert line["nats_per_token"] == (1.0 + float(np.float32(2e-8))) / 3 != 1 / 3


class _Rows:
    def __init__(self, targets, loss_weights):
        self.targets, self.loss_weights = targets, loss_weights


def test_no_more_than_a_few_steps_are_under_way(batches):
    """As many as a domain has batches once made two CPU devices wait for one another."""
    started, waited = [], []

    class Under(np.ndarray):
        def block_until_ready(self):
            waited.append(len(started))
            return self

    def step(params, batch):
        assert len(started) - len(waited) <= SMALL_PROGRAMS
        started.append(None)
        aux = uniform_step(params, batch)
        weight = np.asarray(aux["weight_by_source"])
        return {"nll_sum_by_source": np.asarray(aux["nll_sum_by_source"]).view(Under)} | {
            "weight_by_source": weight
        }

    evaluate(step, jnp.float32(1), batches)
    assert len(started) == 12 and len(waited) == 12 - SMALL_PROGRAMS


def test_a_step_that_drops_tokens_is_caught(batches):
    def lossy(params, batch):
        aux = uniform_step(params, batch)
        return {**aux, "weight_by_source": aux["weight_by_source"] * 0.9}

    with pytest.raises(ValueError, match="scored .* tokens of"):
        evaluate(lossy, jnp.float32(1), batches)


def test_no_bytes_no_bits():
    assert summarise(10.0, 5, None)["bits_per_byte"] is None
    assert summarise(10.0, 5, 0)["bits_per_byte"] is None
    assert summarise(10.0, 5, 2)["nats_per_token"] == 2.0


def test_a_domain_without_a_scored_token_is_refused():
    with pytest.raises(ValueError, match="'en' has no held-out token"):
        EvalBatches({"en": []}, token_num_bytes=None)


def test_when_it_is_due():
    held_out = HeldOut(every_steps=50)
    assert [s for s in range(0, 151) if held_out.due(s)] == [50, 100, 150]
    assert not any(HeldOut().due(s) for s in range(100))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"rows_per_domain": 0}, "rows_per_domain=0"),
        ({"sequence_length": 1.5}, "sequence_length=1.5"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"domains": "en"}, "['en']"),
        ({"domains": ["en", "en"]}, "once"),
        ({"domains": []}, "None = all"),
    ],
)
def test_bad_settings_are_one_line(changes, said):
    with pytest.raises(ValueError) as error:
        HeldOut(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_domain_is_named(data):
    with pytest.raises(ValueError, match="'cc'"):
        HeldOut(domains=["cc"]).batches(data, ["aa"])


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.evals.heldout).failed == 0
