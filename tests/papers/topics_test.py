"""The topical corpus: balanced, its held-out facts really drawn anew, its near-duplicates near."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lcl.data import Data
from lcl.papers.topics import DOMAIN, KEYS, TARGET_KINDS, VALUES, TopicalCorpus, contexts

SMALL = TopicalCorpus(
    num_topics=40, documents_per_topic=10, heldout_per_topic=5, min_facts=16, max_facts=22, seed=3
)
RECALL, REPEAT, OTHER = range(3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    return SMALL.write(tmp_path_factory.mktemp("topics"))


def stated(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A document's topic and its (key, value) pairs, read back from the text."""
    name, facts = text.rstrip("\n").split(":", 1)
    return name, [(facts[i], facts[i + 1]) for i in range(0, len(facts), 2)]


def test_topics_are_balanced():
    for split, size in (("train", 10), ("heldout", 5)):
        topics = np.array([d.topic for d in SMALL.documents(split)])
        assert (np.bincount(topics) == size).all() and len(np.unique(topics)) == 40


def test_every_document_states_its_topics_facts(data):
    """Read back from the store: a key has one value in all documents of a topic and split."""
    tokenizer = data.tokenizer()
    for split in ("train", "heldout"):
        store = data.open(DOMAIN, split)
        facts, names = SMALL.facts(split), SMALL.names()
        assert len(set(names)) == 40
        for i, document in enumerate(SMALL.documents(split)):
            name, pairs = stated(tokenizer.decode(store.document(i)))
            assert name == names[document.topic]
            assert 16 <= len(pairs) <= 22
            for key, value in pairs:
                assert VALUES[facts[document.topic, KEYS.index(key)]] == value


def test_heldout_facts_are_drawn_anew():
    """Independent draws agree in 1 of 16 cells; memory of the training facts is worth nothing."""
    train, heldout = SMALL.facts("train"), SMALL.facts("heldout")
    assert train.shape == heldout.shape == (40, len(KEYS))
    assert (train == heldout).mean() == pytest.approx(1 / len(VALUES), abs=0.04)
    many = dataclasses.replace(SMALL, num_topics=1000).facts("heldout")
    counts = np.bincount(many.ravel(), minlength=len(VALUES))
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_the_seed_decides_everything_and_the_duplicates_nothing_else(tmp_path):
    again = dataclasses.replace(SMALL)
    other = dataclasses.replace(SMALL, seed=4)
    with_copies = dataclasses.replace(SMALL, duplicates=0.2)
    text = [SMALL.text(d, "train") for d in SMALL.documents("train")]
    assert text == [again.text(d, "train") for d in again.documents("train")]
    assert text != [other.text(d, "train") for d in other.documents("train")]
    assert SMALL.names() == with_copies.names()
    assert (SMALL.facts("heldout") == with_copies.facts("heldout")).all()
    ours, theirs = SMALL.documents("heldout"), with_copies.documents("heldout")
    assert all((a.keys == b.keys).all() for a, b in zip(ours, theirs, strict=True))
    # The originals are the same documents as without duplicates.
    kept = [d for d in with_copies.documents("train") if d.copy_of < 0]
    first = [d for i, d in enumerate(SMALL.documents("train")) if i % 10 < 8]
    assert all((a.keys == b.keys).all() for a, b in zip(kept, first, strict=True))


def test_near_duplicates_are_a_fifth_and_near():
    documents = dataclasses.replace(SMALL, duplicates=0.2).documents("train")
    copies = [d for d in documents if d.copy_of >= 0]
    assert len(copies) == 0.2 * len(documents)
    same = []
    for copy in copies:
        original = documents[copy.copy_of]
        assert original.topic == copy.topic and original.copy_of < 0
        same.append((original.keys == copy.keys).mean())
    assert 0.9 < np.mean(same) < 1.0


def test_contexts_score_the_same_targets_behind_other_documents(data):
    store = data.open(DOMAIN, "heldout")
    settings = {"num_rows": 12, "num_before": 4, "sequence_length": 256, "batch_size": 5}
    related = contexts(SMALL, store, related=True, **settings)
    random = contexts(SMALL, store, related=False, **settings)
    assert [b.tokens.shape for b in related] == [(5, 256)] * 3
    tokenizer = data.tokenizer()
    for a, b in zip(related, random, strict=True):
        assert (a.loss_weights.sum(1) == b.loss_weights.sum(1)).all()
        for i in range(5):
            if not a.loss_weights[i].any():
                continue  # the last batch is filled up with padding
            scored_a, scored_b = a.loss_weights[i] > 0, b.loss_weights[i] > 0
            assert (a.targets[i][scored_a] == b.targets[i][scored_b]).all()
            assert (a.source_ids[i][scored_a] == b.source_ids[i][scored_b]).all()
            assert (a.segment_ids[i] == (np.arange(256) < scored_a.nonzero()[0][-1] + 1)).all()
            names = [part.split(":")[0] for part in tokenizer.decode(a.tokens[i]).split("\n")[:5]]
            assert len(names) == 5 and len(set(names)) == 1
            others = [part.split(":")[0] for part in tokenizer.decode(b.tokens[i]).split("\n")[:5]]
            assert len(set(others)) == 5 and others[-1] == names[-1]


def test_marks_are_what_they_say(data):
    """recall: first time in its document and known from the context; repeat: said before."""
    store, tokenizer = data.open(DOMAIN, "heldout"), data.tokenizer()
    (batch,) = contexts(
        SMALL, store, related=True, num_rows=8, num_before=4, sequence_length=256, batch_size=8
    )
    assert TARGET_KINDS == ("recall", "repeat", "other")
    counts = np.zeros(3)
    for i in range(8):
        size = int(batch.segment_ids[i].sum())
        documents = tokenizer.decode(batch.tokens[i, :size]).rstrip("\n").split("\n")
        before = {pair for text in documents[:-1] for pair in stated(text)[1]}
        place = size - int(batch.loss_weights[i].sum())
        marks = batch.source_ids[i, place:size]
        pairs = stated(documents[-1])[1]
        assert len(marks) == len("abc:") + 2 * len(pairs) + 2
        said = set()
        for j, pair in enumerate(pairs):
            expected = REPEAT if pair in said else RECALL if pair in before else OTHER
            assert marks[len("abc:") + 2 * j + 1] == expected
            assert marks[len("abc:") + 2 * j] == OTHER
            assert batch.targets[i, place + len("abc:") + 2 * j + 1] == ord(pair[1])
            said.add(pair)
        counts += np.bincount(marks, minlength=3)
    assert counts.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_topics": 0}, "give at least 1"),
        ({"max_facts": 3}, "below min_facts"),
        ({"duplicates": 1.0}, "share of documents"),
        ({"num_topics": 20_000}, "only 17576 names"),
    ],
)
def test_sizes_that_give_no_corpus_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(SMALL, **change)
    assert "\n" not in str(error.value)


def test_a_row_too_short_and_too_few_documents_are_refused(data):
    store = data.open(DOMAIN, "heldout")
    settings = {"related": True, "num_rows": 2, "batch_size": 2}
    with pytest.raises(ValueError, match="do not fit a row of 64"):
        contexts(SMALL, store, num_before=4, sequence_length=64, **settings)
    with pytest.raises(ValueError, match="need more of them"):
        contexts(SMALL, store, num_before=5, sequence_length=256, **settings)
