"""Samples: which prompts, and continuations of models that can be followed by hand."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcl.evals.samples
from lcl.data.testing import make_stores
from lcl.data.tokenizers import ByteTokenizer
from lcl.evals.samples import (
    Prompt,
    Samples,
    choose_prompts,
    make_generate,
    pad_prompts,
    sample_line,
)


def favourites(params, tokens, at):
    """A model that only knows how often each token followed another: params [V, V]."""
    last = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
    return params[last]


def test_greedy_takes_the_likeliest_and_looks_at_nothing_behind():
    table = jnp.array([[0.0, 5.0, 1.0], [1.0, 0.0, 5.0], [5.0, 1.0, 0.0]])  # 0 -> 1 -> 2 -> 0
    generate = jax.jit(make_generate(favourites, length=4))
    rows, starts = jnp.array([[2, 9, 9, 9, 9, 9], [0, 1, 9, 9, 9, 9]]), jnp.array([1, 2])
    key = jax.random.key(0)
    assert generate(table, rows, starts, key).tolist() == [[0, 1, 2, 0], [2, 0, 1, 2]]


def test_ids_beyond_the_tokenizer_are_never_drawn():
    table = jnp.zeros((4, 4)).at[:, 3].set(9.0).at[:, 1].set(1.0)
    rows, starts, key = jnp.zeros((1, 4), jnp.int32), jnp.array([1]), jax.random.key(0)
    greedy = make_generate(favourites, length=3, vocab_size=3)
    assert greedy(table, rows, starts, key).tolist() == [[1, 1, 1]]
    drawn = make_generate(favourites, length=3, vocab_size=3, temperature=5.0)
    for seed in range(20):
        assert int(drawn(table, rows, starts, jax.random.key(seed)).max()) < 3


def test_temperature_draws_in_proportion_and_by_the_key():
    table = jnp.log(jnp.array([[0.7, 0.2, 0.1]] * 3))
    rows, starts = jnp.zeros((4000, 2), jnp.int32), jnp.ones(4000, jnp.int32)
    key = jax.random.key(3)
    once = make_generate(favourites, length=1, temperature=1.0)(table, rows, starts, key)
    again = make_generate(favourites, length=1, temperature=1.0)(table, rows, starts, key)
    np.testing.assert_array_equal(once, again)
    shares = np.bincount(np.asarray(once).ravel(), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.03)
    flat = make_generate(favourites, length=1, temperature=2.0)(table, rows, starts, key)
    root = np.sqrt([0.7, 0.2, 0.1])
    shares = np.bincount(np.asarray(flat).ravel(), minlength=3) / 4000
    np.testing.assert_allclose(shares, root / root.sum(), atol=0.03)


def test_prompts_are_the_same_documents_whoever_asks(tmp_path):
    data = make_stores(tmp_path, {"a": 40, "b": 40}, mean_words=10)
    samples = Samples(num_per_domain=3, prompt_length=16, length=8)
    prompts = choose_prompts(data, ["b", "a"], samples)
    assert [p.domain for p in prompts] == ["b"] * 3 + ["a"] * 3
    assert [p.document for p in choose_prompts(data, ["a"], samples)] == [
        p.document for p in prompts[3:]
    ]
    for prompt in prompts:
        store = data.open(prompt.domain, "heldout")
        (index,) = np.flatnonzero(store.document_ids == prompt.document)
        text = store.document(int(index))
        assert prompt.tokens[0] == store.bos_id and len(prompt.tokens) == 16
        np.testing.assert_array_equal(prompt.tokens, text[:16])
        np.testing.assert_array_equal(prompt.reference, text[16:24])


def test_a_short_document_gives_its_first_half(tmp_path):
    data = make_stores(tmp_path, {"a": 8}, mean_words=3)
    prompts = choose_prompts(data, ["a"], Samples(9, prompt_length=500, length=500))
    store = data.open("a", "heldout")
    assert len(prompts) == store.num_documents  # all there are
    for prompt in prompts:
        (index,) = np.flatnonzero(store.document_ids == prompt.document)
        text = store.document(int(index))[:-1]
        assert len(prompt.tokens) == len(text) // 2
        np.testing.assert_array_equal(np.append(prompt.tokens, prompt.reference), text)


def test_rows_are_padded_and_a_line_ends_at_eos():
    prompt = Prompt("a", 7, np.array([256, 104, 105], np.int32), np.array([33], np.int32))
    short = prompt._replace(tokens=np.array([256], np.int32))
    tokens, starts = pad_prompts([short, prompt], num_rows=3, row_length=5)
    assert starts.tolist() == [1, 3, 3]
    assert tokens.tolist() == [[256, 0, 0, 0, 0], [256, 104, 105, 0, 0], [256, 104, 105, 0, 0]]
    line = sample_line(prompt, np.array([33, 257, 90]), ByteTokenizer(), step=4, stage="x")
    assert line == {
        "step": 4,
        "stage": "x",
        "domain": "a",
        "document": 7,
        "prompt": "hi",
        "continuation": "!",
        "ended": True,
        "reference": "!",
    }
    assert not sample_line(prompt, np.array([33, 90]), ByteTokenizer())["ended"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_per_domain": 0}, "Samples.num_per_domain=0 must be a whole number of at least 1"),
        ({"length": 2.5}, "Samples.length=2.5 must be"),
        ({"temperature": -1.0}, "Samples.temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "Samples.temperature=nan must be 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Samples(**changes)
    assert "\n" not in str(error.value)


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.evals.samples).failed == 0
