"""A topical corpus whose facts the weights cannot know: the world of a small in-context experiment.

A topic is a name and a table of facts, one value for each key. A document states some of its
topic's facts in a random order:

    topic "qzv"     0 -> M    1 -> C    2 -> H    ...   7 -> B          8 facts
    documents       "qzv:2H0M7B2H"    "qzv:1C7B0M..."                   a value after its key

    training        facts drawn by the key ("facts", seed, "train")
    held-out        the same topics and names, facts drawn anew by ("facts", seed, "heldout")

So the value of a key that its document has not yet mentioned can be read from an earlier document
of the topic, if there is one in the context, and from nowhere else: whoever learned the training
facts by heart is wrong in 15 of 16 cases. Without such a context, no model can do better than
log 16 = 2.77 nats. Documents are many more than a fact is often stated, so that the weights learn
few facts and the loss is not that of a memory which the evaluation contradicts.

Near-duplicates replace documents, so that their share changes neither the number of documents nor
(much) of tokens: a copy of another document of its topic with a few statements drawn again.

Source: the small experiment on In-Context Pretraining (2310.10638): key -> value recall with facts
resampled at evaluation.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import string
from typing import NamedTuple

import numpy as np

from lcl.data import Batch, Data, Store, StoreWriter
from lcl.data.ordering import named_key
from lcl.data.tokenizers import ByteTokenizer
from lcl.papers import code

DOMAIN = "topics"
KEYS = string.digits[:8]  # no letter: a key is never mistaken for a part of a name
VALUES = string.ascii_uppercase[:16]
_NAME_LETTERS = 3
_DUPLICATE_CHANGES = 0.06  # share of a near-duplicate's statements that are drawn again
# What a scored target is; the marks of `contexts` in Batch.source_ids.
TARGET_KINDS = ("recall", "repeat", "other")


class Statements(NamedTuple):
    """One document before it is text.

    topic: its topic; keys: int64[n], the facts it states, in order; copy_of: the document of the
    corpus that it nearly repeats, or -1.
    """

    topic: int
    keys: np.ndarray
    copy_of: int


@dataclasses.dataclass(frozen=True)
class TopicalCorpus:
    r"""How many topics, documents and near-duplicates; everything else follows from the seed.

    Attributes:
      num_topics: topics, all equally large.
      documents_per_topic: documents of each in training.
      heldout_per_topic: documents of each with resampled facts.
      min_facts, max_facts: statements of a document, uniform.
      duplicates: share of the training documents that are near-duplicates of others.
      seed: draws names, facts and documents, each by a key of its own name.

    >>> corpus = TopicalCorpus(num_topics=2, documents_per_topic=1, min_facts=2, max_facts=2)
    >>> len(corpus.text(corpus.documents("train")[0], "train")) == len("abc:kVkV\n")
    True
    """

    num_topics: int = 2048
    documents_per_topic: int = 12
    heldout_per_topic: int = 5
    min_facts: int = 9
    max_facts: int = 15
    duplicates: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses sizes that give no corpus."""
        for name in ("num_topics", "documents_per_topic", "heldout_per_topic", "min_facts"):
            if getattr(self, name) < 1:
                raise ValueError(f"TopicalCorpus.{name}={getattr(self, name)}; give at least 1")
        if self.max_facts < self.min_facts:
            raise ValueError(
                f"TopicalCorpus.max_facts={self.max_facts} is below min_facts={self.min_facts}; "
                "raise it"
            )
        if not 0.0 <= self.duplicates < 1.0:
            raise ValueError(
                f"TopicalCorpus.duplicates={self.duplicates} is a share of documents; give 0 or "
                "more and less than 1"
            )
        if self.num_topics > len(string.ascii_lowercase) ** _NAME_LETTERS:
            raise ValueError(
                f"TopicalCorpus.num_topics={self.num_topics}: there are only "
                f"{len(string.ascii_lowercase) ** _NAME_LETTERS} names; give fewer"
            )

    def names(self) -> list[str]:
        """Names of the topics, all different and the same in both splits."""
        letters = string.ascii_lowercase
        picks = self._rng("names").permutation(len(letters) ** _NAME_LETTERS)[: self.num_topics]
        return [
            "".join(letters[pick // len(letters) ** i % len(letters)] for i in range(_NAME_LETTERS))
            for pick in picks.tolist()
        ]

    def facts(self, split: str) -> np.ndarray:
        """Values by topic and key, int64[num_topics, len(KEYS)]; each split draws its own."""
        shape = (self.num_topics, len(KEYS))
        return self._rng("facts", split).integers(len(VALUES), size=shape)

    def documents(self, split: str) -> list[Statements]:
        """The documents of a split, topic after topic; the near-duplicates come last in each."""
        size = self.documents_per_topic if split == "train" else self.heldout_per_topic
        num_copies = round(size * self.duplicates) if split == "train" else 0
        documents: list[Statements] = []
        for topic in range(self.num_topics):
            rng = self._rng("documents", split, topic)
            first = len(documents)
            for _ in range(size - num_copies):
                count = int(rng.integers(self.min_facts, self.max_facts + 1))
                documents.append(Statements(topic, rng.integers(len(KEYS), size=count), -1))
            copies = self._rng("copies", split, topic)
            for _ in range(num_copies):
                original = first + int(copies.integers(size - num_copies))
                keys = documents[original].keys.copy()
                changed = copies.random(len(keys)) < _DUPLICATE_CHANGES
                keys[changed] = copies.integers(len(KEYS), size=int(changed.sum()))
                documents.append(Statements(topic, keys, original))
        return documents

    def text(self, document: Statements, split: str) -> str:
        """A document as text: its topic's name, then its statements."""
        values = self.facts(split)[document.topic, document.keys]
        return _text(self.names()[document.topic], document.keys, values)

    def write(self, root: str | os.PathLike[str]) -> Data:
        """Writes both splits as stores under `root`, unless they are there, and opens it."""
        names = self.names()
        settings = {
            "topical_corpus": dataclasses.asdict(self),
            "code": code.file_hash(pathlib.Path(__file__)),
        }
        for split in ("train", "heldout"):
            path = os.path.join(os.fspath(root), DOMAIN, split)
            if code.keep_store(path, settings):
                continue
            facts = self.facts(split)
            with StoreWriter(
                path,
                tokenizer=ByteTokenizer(),
                domain=DOMAIN,
                split=split,
                licence="synthetic",
                settings=settings,
            ) as writer:
                for number, (topic, keys, copy_of) in enumerate(self.documents(split)):
                    writer.add(
                        _text(names[topic], keys, facts[topic, keys]),
                        document_id=number,
                        source=DOMAIN,
                        extras={"topic": topic, "copy_of": copy_of},
                    )
        return Data(os.fspath(root))

    def _rng(self, *name: str | int) -> np.random.Generator:
        # Philox by a named key: another topic, or one more draw elsewhere, changes nothing here.
        key = named_key("topical corpus", self.seed, *name, bits=128)
        return np.random.Generator(np.random.Philox(key=key))


def _text(name: str, keys: np.ndarray, values: np.ndarray) -> str:
    stated = (KEYS[k] + VALUES[v] for k, v in zip(keys.tolist(), values.tolist(), strict=True))
    return f"{name}:{''.join(stated)}\n"


def contexts(
    corpus: TopicalCorpus,
    store: Store,
    *,
    related: bool,
    num_rows: int,
    num_before: int,
    sequence_length: int,
    batch_size: int,
) -> list[Batch]:
    """Rows in which one held-out document is scored behind others of its topic, or of other topics.

    The scored documents and their marks are the same either way; only what stands before them
    differs. One segment a row, as in-context pretraining trains.

        related    |qzv:2H0M..|qzv:1C0M..|qzv:7B2H..|qzv:0M1C..|....
        random     |kio:0A3D..|upx:2J1E..|rab:7F4C..|qzv:0M1C..|....
                                                   ^ scored: loss_weights 1 here only

    Args:
      corpus: what `store` was written by.
      store: the corpus's held-out split.
      related: whether the documents before the scored one are of its topic.
      num_rows: how many rows; topics take turns.
      num_before: documents before the scored one.
      sequence_length: T; the documents of a row must fit.
      batch_size: rows of a batch; the last one is filled up with padding.

    Returns:
      Batches whose source_ids mark each scored target by its place in TARGET_KINDS: "recall", a
      value that its document states for the first time and a related context has stated; "repeat",
      a value its document has stated before; "other", everything else.

    Raises:
      ValueError: too few documents a topic or topics, or a row too short for its documents.
    """
    documents = corpus.documents("heldout")
    if corpus.heldout_per_topic <= num_before or corpus.num_topics <= num_before:
        raise ValueError(
            f"{num_before} documents before the scored one need more of them: heldout_per_topic="
            f"{corpus.heldout_per_topic} and num_topics={corpus.num_topics} must be larger"
        )
    rng = corpus._rng("contexts", "related" if related else "random")
    rows = []
    for number in range(num_rows):
        turn, topic = divmod(number, corpus.num_topics)
        own = topic * corpus.heldout_per_topic + np.arange(corpus.heldout_per_topic)
        own = np.roll(own, -turn)
        scored, before = int(own[0]), own[1 : 1 + num_before]
        marks = _marks(documents[scored], [documents[d] for d in before])
        if not related:
            others = np.delete(np.arange(corpus.num_topics), topic)
            chosen = rng.permutation(others)[:num_before]
            places = rng.integers(corpus.heldout_per_topic, size=num_before)
            before = chosen * corpus.heldout_per_topic + places
        rows.append(([*before.tolist(), scored], marks))
    return [
        _rows_batch(store, rows[begin : begin + batch_size], batch_size, sequence_length)
        for begin in range(0, num_rows, batch_size)
    ]


def _marks(scored: Statements, before: list[Statements]) -> np.ndarray:
    """The kind of each target of a stored document: name, colon, "kV" each, newline, eos."""
    recall, repeat, other = range(3)
    known = {k for document in before for k in document.keys.tolist()}
    marks = np.full(_NAME_LETTERS + 1 + 2 * len(scored.keys) + 2, other)
    said: set[int] = set()
    for place, key in enumerate(scored.keys.tolist()):
        value = _NAME_LETTERS + 1 + 2 * place + 1
        marks[value] = repeat if key in said else recall if key in known else other
        said.add(key)
    return marks


def _rows_batch(
    store: Store, rows: list[tuple[list[int], np.ndarray]], batch_size: int, sequence_length: int
) -> Batch:
    """Lays out rows of (documents, marks of the last one's targets)."""
    shape = (batch_size, sequence_length)
    tokens, targets, segments, positions, sources = np.zeros((5, *shape), np.int32)
    weights = np.zeros(shape, np.float32)
    for i, (documents, marks) in enumerate(rows):
        stored = [np.asarray(store.document(d), np.int32) for d in documents]
        inputs = np.concatenate([d[:-1] for d in stored])
        size, scored = len(inputs), len(marks)
        if size > sequence_length:
            raise ValueError(
                f"{len(documents)} documents of {size} transitions do not fit a row of "
                f"{sequence_length}; lengthen the row or give fewer documents before the scored one"
            )
        assert len(stored[-1]) == scored + 1
        tokens[i, :size] = inputs
        targets[i, :size] = np.concatenate([d[1:] for d in stored])
        segments[i, :size] = 1
        positions[i, :size] = np.arange(size)
        sources[i, size - scored : size] = marks
        weights[i, size - scored : size] = 1.0
    return Batch(tokens, targets, segments, positions, weights, sources)
