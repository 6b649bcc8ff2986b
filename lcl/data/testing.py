"""Small stores of synthetic text, for tests and examples that must not wait for real material."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping

import numpy as np

from lcl.data.store import Data, StoreWriter
from lcl.data.tokenizers import ByteTokenizer, Tokenizer

# A "language" is an alphabet and a lexicon drawn from it; the scripts differ so that a model which
# forgets one can be seen to. Vowels and consonants alternate, so words look like words.
_ALPHABETS = (
    ("aeiou", "bcdfghklmnprstvw"),
    ("aéèiôuœ", "bcdfgjlmnpqrstvx"),
    ("аеиоуы", "бвгдзклмнпрстч"),
    ("あいうえお", "かきさしたなはまやら"),
)


def make_text(rng: np.random.Generator, words: list[str], num_words: int) -> str:
    """Sentences of Zipf-distributed `words`: "Kato beli kato. ..." with a line break now and then.

    Args:
        rng: the source of chance.
        words: a lexicon (see `make_lexicon`), most frequent first.
        num_words: how many words.
    """
    probabilities = 1.0 / np.arange(1, len(words) + 1)
    picks = rng.choice(len(words), size=num_words, p=probabilities / probabilities.sum())
    ends = np.cumsum(rng.integers(4, 12, size=num_words // 4 + 2))
    sentences, start = [], 0
    for end in ends:
        sentence = " ".join(words[i] for i in picks[start:end])
        if sentence:
            sentences.append(sentence[0].upper() + sentence[1:] + ".")
        start = int(end)
    return "".join(s + ("\n" if i % 3 == 2 else " ") for i, s in enumerate(sentences))


def make_lexicon(domain: str, num_words: int = 200) -> list[str]:
    """The words of the made-up language named `domain`; the same name gives the same words."""
    rng = np.random.default_rng(zlib.crc32(domain.encode()))
    vowels, consonants = _ALPHABETS[zlib.crc32(domain.encode()) % len(_ALPHABETS)]
    lexicon: dict[str, None] = {}
    while len(lexicon) < num_words:
        syllables = int(rng.integers(1, 4))
        letters = [
            str(rng.choice(list(kind))) for _ in range(syllables) for kind in (consonants, vowels)
        ]
        lexicon["".join(letters)] = None
    return list(lexicon)


def make_stores(
    root: str | os.PathLike[str],
    domains: Mapping[str, int],
    seed: int = 0,
    *,
    mean_words: int = 40,
    heldout_fraction: float = 0.2,
    tokenizer: Tokenizer | None = None,
) -> Data:
    """Writes a root of synthetic stores, both splits of every domain; milliseconds each.

    Args:
        root: directory to fill; need not exist.
        domains: number of documents (train and held-out together) of each domain, at least 2.
        seed: the same seed gives the same bytes, in whatever order the domains are named.
        mean_words: document lengths are log-normal about this.
        heldout_fraction: share of documents held out; at least one.
        tokenizer: default: bytes.

    Returns:
        Data(root).

    >>> data = make_stores(tmp, {"en": 10, "fr": 5}, seed=1)  # doctest: +SKIP
    >>> data.open("en").num_documents, data.open("en", "heldout").num_documents  # doctest: +SKIP
    (8, 2)
    """
    root = os.fspath(root)
    tokenizer = tokenizer or ByteTokenizer()
    for domain, num_documents in domains.items():
        if num_documents < 2:
            raise ValueError(f"domain {domain!r} needs at least 2 documents, not {num_documents}")
        rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
        words = make_lexicon(domain)
        lengths = np.maximum(3, rng.lognormal(np.log(mean_words), 0.7, num_documents)).astype(int)
        texts = [make_text(rng, words, int(length)) for length in lengths]
        num_heldout = max(1, round(num_documents * heldout_fraction))
        for split, chosen in (
            ("heldout", range(num_heldout)),
            ("train", range(num_heldout, num_documents)),
        ):
            with StoreWriter(
                os.path.join(root, domain, split),
                tokenizer=tokenizer,
                domain=domain,
                split=split,
                licence="synthetic",
                settings={"synthetic": seed},
            ) as writer:
                for i in chosen:
                    writer.add(texts[i], document_id=i, source=domain)
    return Data(root)
