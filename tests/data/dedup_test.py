"""Near-duplicates: measured against the exact similarity; first stays; never across the split."""

from __future__ import annotations

import doctest
import itertools
import json
import re
import sys

import numpy as np
import pytest

from lcl.data import dedup
from lcl.data.dedup import DedupError, Embedding, MinHash, parse_near_duplicates
from lcl.data.prepare import prepare
from lcl.data.testing import make_lexicon, make_text

pytest.importorskip("rensa", reason="the dedup extra, part of dev, has it")
NEARS = [MinHash(0.7), Embedding(0.95)]


def jaccard(a: str, b: str, n: int = 5) -> float:
    """The exact share of common runs of words."""

    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    one, two = runs(a), runs(b)
    return len(one & two) / len(one | two)


@pytest.fixture(scope="module")
def families() -> list[list[str]]:
    """Texts and ever more altered copies of each."""
    rng, words = np.random.default_rng(0), make_lexicon("any")
    found = []
    for _ in range(30):
        text = make_text(rng, words, 200).split()
        family = [" ".join(text)]
        for changes in (1, 2, 4, 40):
            copy = list(text)
            for i in rng.integers(0, len(copy), changes):
                copy[i] = "altered"
            family.append(" ".join(copy))
        found.append(family)
    return found


def test_minhash_estimates_the_jaccard_similarity(families):
    texts = [text for family in families for text in family]
    signatures = MinHash().signatures(texts)
    assert signatures.shape == (150, 128) and signatures.dtype == np.uint32
    errors = []
    for family in range(30):
        for i, j in itertools.combinations(range(5 * family, 5 * family + 5), 2):
            estimate = (signatures[i] == signatures[j]).mean()
            errors.append(estimate - jaccard(texts[i], texts[j]))
    # 300 estimates, standard deviation at most .044 each.
    assert abs(np.mean(errors)) < 0.02 and np.max(np.abs(errors)) < 0.2


def test_minhash_finds_the_near_and_leaves_the_far(families):
    minhash = MinHash(0.7)
    texts = [text for family in families for text in family]
    near = minhash.index().add_new(minhash.signatures(texts))
    kept: list[str] = []
    wrong = 0
    for text, dropped in zip(texts, near, strict=True):
        best = max((jaccard(text, other) for other in kept), default=0.0)
        # Within three deviations of the threshold the estimate may say either.
        if best > 0.82:
            wrong += not dropped
        elif best < 0.58:
            wrong += dropped
        if not dropped:
            kept.append(text)
    assert wrong == 0
    assert 30 <= near.sum() <= 110


def test_bands_find_99_percent_at_the_threshold():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        bands, rows = MinHash(threshold).bands()
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.995


def test_an_index_that_is_gone_on_with_is_the_index(families):
    texts = [text for family in families for text in family]
    for near in NEARS:
        signatures = near.signatures(texts)
        whole = near.index()
        first, second = whole.add_new(signatures[:70]), whole.add_new(signatures[70:])
        resumed = near.index()
        resumed.add_kept(signatures[:70][~first])
        assert (resumed.add_new(signatures[70:]) == second).all()


def test_cosine_index_is_the_greedy_rule():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(80, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = Embedding(0.9).index()
    near = np.concatenate([index.add_new(rows[:33]), index.add_new(rows[33:])])
    kept: list[np.ndarray] = []
    for row, dropped in zip(rows, near, strict=True):
        assert dropped == any(row @ other >= 0.9 for other in kept)
        if not dropped:
            kept.append(row)


@pytest.mark.parametrize("near", NEARS, ids=["minhash", "embedding"])
def test_no_near_copy_straddles_the_split(near, tmp_path, families):
    path = tmp_path / "x.jsonl"
    texts = [text for i in range(3) for text in [family[i] for family in families]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = {}
    for name, option in (("with", near), ("without", None)):
        pair = prepare(
            root=tmp_path / name,
            jsonl={"mine": str(path)},
            heldout_fraction=0.4,
            near_duplicates=option,
            log=lambda line: None,
        )
        stores[name] = [
            [store.tokenizer().decode(store.document(i)) for i in range(store.num_documents)]
            for store in pair
        ]
        ledger = pair[0].meta["ledger"]

        def straddling(sides) -> int:
            return sum(jaccard(a, b) > 0.82 for a in sides[0] for b in sides[1])

        if option is None:
            assert straddling(stores[name]) > 5  # else the test shows nothing
        else:
            assert straddling(stores[name]) == 0
    train, heldout = stores["without"]
    assert len(train) + len(heldout) == 90
    kept = {text for side in stores["with"] for text in side}
    assert kept == {family[0] for family in families}  # the first of each stays
    assert prepare is not None and ledger["read"] == 90


def test_each_drop_is_in_the_ledger(tmp_path, families):
    path = tmp_path / "x.jsonl"
    texts = [text for family in families for text in family[:2]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = prepare(
        root=tmp_path / "r",
        jsonl={"mine": str(path)},
        near_duplicates=MinHash(0.7),
        log=lambda line: None,
    )
    ledger = stores[0].meta["ledger"]
    assert ledger["dropped"] == {"near duplicate": 30}
    gone = sum(len(family[1]) + 2 for family in families)
    assert ledger["tokens"]["dropped"] == {"near duplicate": gone}
    assert stores[0].meta["settings"]["near_duplicates"]["threshold"] == 0.7


def test_texts_of_one_script_without_blanks_have_words():
    a = "日本語の文章は単語の間に空白がないので、一文字を一語と数える。" * 3
    b = a.replace("文字", "字", 1)
    c = "まったく別の内容を持つ文であり、先のものとは共通するところが少ない。"
    rows = MinHash().signatures([a, b, c])
    assert (rows[0] == rows[1]).mean() > 0.5 > 0.1 > (rows[0] == rows[2]).mean()


def test_texts_of_a_word_or_of_none():
    rows = MinHash().signatures(["one", "one", "two", "?!", "..."])
    same = (rows[:, None] == rows[None]).all(-1)
    assert same[0, 1] and not same[0, 2] and not same[3, 4]
    assert Embedding().index().add_new(Embedding().signatures(["?!", "..."])).tolist() == [0, 0]


def test_ones_own_embedding():
    def by_length(texts):
        return np.asarray([[len(text), 10.0] for text in texts])

    near = Embedding(0.999, by_length)
    assert near.index().add_new(near.signatures(["abc", "xyz", "a" * 99])).tolist() == [0, 1, 0]
    assert "by_length" in near.settings()["embed"]
    with pytest.raises(DedupError, match="finite row"):
        Embedding(0.9, lambda texts: np.full((1, 2), np.nan)).signatures(["a"])


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DedupError, match=r"pip install 'lcl\[dedup\]'") as caught:
        MinHash()
    assert "\n" not in str(caught.value)


def test_from_the_command_line():
    assert parse_near_duplicates("minhash") == MinHash()
    assert parse_near_duplicates("minhash:0.6") == MinHash(0.6)
    for text, word in (("minhsh", "minhsh"), ("minhash:x", "'x'"), ("embedding:2", "2.0")):
        with pytest.raises(DedupError, match=word):
            parse_near_duplicates(text)
    assert doctest.testmod(dedup).failed == 0
