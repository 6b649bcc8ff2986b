"""lcl.data.embeddings: a vector for each document."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data import embeddings
from lcl.data.embeddings import (
    FromFunction,
    HashedTfidf,
    Precomputed,
    SentenceEncoder,
    mean_pooled,
    quantise,
)
from lcl.data.store import Store, StoreWriter
from lcl.data.testing import make_stores
from lcl.data.tokenizers import ByteTokenizer


def make_store(path, texts):
    tokenizer = ByteTokenizer()
    with StoreWriter(path, tokenizer=tokenizer, domain="d", split="train") as writer:
        for i, text in enumerate(texts):
            writer.add(text, document_id=i)
    return Store.open(path)


def all_of(embedder, store, **options):
    return np.concatenate(list(embedder.embed(store, **options)))


def plain_tfidf(store, ngrams, num_tokens):
    """TF-IDF vectors over the n-grams themselves, by dictionaries: no hash, no projection."""
    counts = []
    for i in range(store.num_documents):
        tokens = store.document(i)[:num_tokens].tolist()
        count: dict[tuple[int, ...], int] = {}
        for n in ngrams:
            for j in range(len(tokens) - n + 1):
                gram = tuple(tokens[j : j + n])
                count[gram] = count.get(gram, 0) + 1
        counts.append(count)
    frequency: dict[tuple[int, ...], int] = {}
    for count in counts:
        for gram in count:
            frequency[gram] = frequency.get(gram, 0) + 1
    grams = {gram: i for i, gram in enumerate(frequency)}
    table = np.zeros((len(counts), len(grams)))
    for i, count in enumerate(counts):
        for gram, times in count.items():
            rarity = np.log((1 + len(counts)) / (1 + frequency[gram])) + 1
            table[i, grams[gram]] = (1 + np.log(times)) * rarity
    return table / np.linalg.norm(table, axis=1, keepdims=True)


@pytest.mark.parametrize(("ngrams", "num_tokens"), [((1, 2), 4096), ((3,), 20)])
def test_products_are_those_of_tfidf(tmp_path, ngrams, num_tokens):
    """A wide projection and a large hash leave the cosines of the plain thing."""
    store = make_stores(tmp_path, {"en": 40}, seed=3).open("en")
    embedder = HashedTfidf(dim=1 << 15, ngrams=ngrams, num_tokens=num_tokens, num_buckets=1 << 22)
    vectors = all_of(embedder, store).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    want = plain_tfidf(store, ngrams, num_tokens)
    assert np.abs(vectors @ vectors.T - want @ want.T).max() < 0.06


def test_a_document_does_not_see_the_next(tmp_path):
    """N-grams do not run over a document's end: what follows it changes rarities at most."""
    texts = ["the cat sat", "on a mat", "quite another thing"]
    one = make_store(tmp_path / "a", texts)
    two = make_store(tmp_path / "b", [texts[0], texts[2], texts[1]])
    embedder = HashedTfidf(dim=64)
    a, b = all_of(embedder, one), all_of(embedder, two)
    assert np.array_equal(a[[0, 2, 1]], b)


@given(block=st.integers(1, 400), start=st.integers(0, 32))
def test_blocks_and_a_later_start_change_nothing(block, start):
    store = _stores()
    embedder = HashedTfidf(dim=32, num_buckets=1 << 10)
    want = all_of(embedder, store)
    before = embeddings._BLOCK_TOKENS
    embeddings._BLOCK_TOKENS = block
    try:
        blocks = list(embedder.embed(store, start=start))
    finally:
        embeddings._BLOCK_TOKENS = before
    assert np.array_equal(np.concatenate([want[:0], *blocks]), want[start:])


def _stores(cache={}):  # noqa: B006
    if not cache:
        import tempfile

        cache["folder"] = tempfile.TemporaryDirectory()
        cache["store"] = make_stores(cache["folder"].name, {"en": 40}).open("en")
    return cache["store"]


def test_what_is_alike_is_near_and_long_documents_are_cut(tmp_path):
    words = ["apple pear plum cherry fig " * 30, "plum fig pear apple cherry " * 30]
    other = ["socket bind listen accept poll " * 30, "accept poll bind socket listen " * 30]
    store = make_store(tmp_path / "s", [*words, *other, words[0] + other[0] * 50])
    vectors = all_of(HashedTfidf(num_tokens=256), store)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = vectors @ vectors.T
    assert table[0, 1] > 0.3 > 0.2 > table[0, 2]
    assert table[2, 3] > 0.3
    assert table[0, 4] > 0.95  # of the last document only the beginning is read


def test_seeds_and_golden(tmp_path):
    """Neighbours of a run must not change under it: these numbers are forever."""
    store = make_store(tmp_path / "s", ["ab ab ab", "ba"])
    vectors = all_of(HashedTfidf(dim=4, ngrams=(1, 2), num_buckets=16), store)
    other = all_of(HashedTfidf(dim=4, ngrams=(1, 2), num_buckets=16, seed=1), store)
    assert not np.allclose(vectors, other)
    assert np.allclose(vectors, [[8.46, -5.708, 3.519, 0.57], [5.0, -5.38, 0.0, 2.38]], atol=1e-3)


def test_default_lengths_follow_the_vocabulary(tmp_path):
    store = make_store(tmp_path / "s", ["some text here", "other text there"])
    assert np.array_equal(
        all_of(HashedTfidf(dim=8), store), all_of(HashedTfidf(dim=8, ngrams=(4, 5)), store)
    )
    assert HashedTfidf()._lengths(32_000) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "HashedTfidf has dim 0"),
        ({"num_buckets": 1000}, "num_buckets is 1000; give a power of two"),
        ({"ngrams": ()}, r"ngrams is \(\); give lengths of 1 or more"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HashedTfidf(**options)


def test_precomputed_is_known_by_its_content(tmp_path):
    store = make_store(tmp_path / "s", ["a", "b", "c"])
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", vectors)
    np.save(tmp_path / "z.npy", vectors + 1)
    x, y, z = (Precomputed(str(tmp_path / f"{name}.npy")) for name in "xyz")
    assert x.settings() == y.settings() != z.settings()
    assert np.array_equal(all_of(x, store, start=1), vectors[1:])
    np.save(tmp_path / "x.npy", vectors[:2])
    with pytest.raises(ValueError, match=r"has the shape \[2, 2\]; the store has 3 documents"):
        all_of(x, store)
    with pytest.raises(ValueError, match="cannot read embeddings from 'nowhere.npy'"):
        Precomputed("nowhere.npy").settings()


def test_a_function_gives_vectors(tmp_path):
    store = make_store(tmp_path / "s", ["aa", "b"])
    embedder = FromFunction(lambda store: store.lengths[:, None], name="length")
    assert all_of(embedder, store).tolist() == [[4], [3]]
    with pytest.raises(ValueError, match="what 'bad' returned has the shape"):
        all_of(FromFunction(lambda store: store.lengths, name="bad"), store)


def test_a_sentence_encoder_gets_texts(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, path):
            assert path == "some/model"

        def encode(self, texts, show_progress_bar):
            assert not show_progress_bar
            return np.array([[len(text), text.count("o")] for text in texts], np.float64)

    module = types.SimpleNamespace(SentenceTransformer=Fake)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    store = make_store(tmp_path / "s", ["hello", "foo bar", "x"])
    embedder = SentenceEncoder("some/model", batch_size=2)
    assert all_of(embedder, store).tolist() == [[5, 1], [7, 2], [1, 0]]
    assert all_of(embedder, store, start=2).tolist() == [[1, 0]]
    assert all_of(SentenceEncoder("some/model", num_tokens=3), store)[0].tolist() == [3, 0]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"pip install lcl\[sentence\]"):
        all_of(embedder, store)


def test_states_are_averaged_over_real_tokens(tmp_path):
    store = make_store(tmp_path / "s", ["hello", "b", "long text " * 9])
    shapes = set()

    def hidden(tokens, segment_ids):
        shapes.add(tokens.shape)
        return np.stack([tokens, 1 - segment_ids], axis=2) + np.float32(0.5)

    means = mean_pooled(hidden, store, num_tokens=16, batch_size=2)
    want = [store.document(i)[:16].mean() + 0.5 for i in range(3)]
    assert np.allclose(means[:, 0], want)
    assert np.allclose(means[:, 1], 0.5)  # no padding in any mean
    assert shapes == {(2, 16)}


@given(data=st.data())
def test_quantised_products_are_exact_in_float32(data):
    dim = data.draw(st.sampled_from([1, 3, 256, 5000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    kind = data.draw(st.sampled_from(["normal", "equal", "sparse"]))
    vectors = {
        "normal": rng.normal(size=(6, dim)),
        "equal": np.ones((6, dim)) * rng.choice([-1, 1], (6, 1)),
        "sparse": rng.normal(size=(6, dim)) * (rng.random((6, dim)) < 0.1),
    }[kind] * 10.0 ** data.draw(st.integers(-20, 20))
    small = quantise(vectors)
    products = small.astype(np.int64) @ small.T.astype(np.int64)
    assert np.abs(products).max() <= 2**24
    length = np.linalg.norm(vectors, axis=1)
    real = length > 0
    assert not small[~real].any()
    cosine = np.einsum("nd,nd->n", small[real], vectors[real].astype(np.float64))
    cosine /= np.linalg.norm(small[real].astype(np.float64), axis=1) * length[real]
    assert (cosine > 0.999).all()


def test_quantise_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="the embedding of document 1 is not finite"):
        quantise([[1.0, 2.0], [np.inf, 0.0]])
