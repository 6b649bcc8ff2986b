"""Tokenizers give text back byte for byte, and say how many bytes each token stands for."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.testing import make_lexicon, make_text
from lcl.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    train_sentencepiece,
)

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60)
AWKWARD = [
    "", " ", "\n", "  two  blanks  ", "\t\ttabs\r\n\r\n", "▁", "a▁ ▁b", "<s></s><unk><0x0A>",
    "naïve café — 日本語 \U0001f600\u200d\u0301", "\x01\x7f\u2028\ufeff", "x" * 3000,
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [make_text(rng, make_lexicon(name), 300) for name in ("one", "two", "three") * 4]


@pytest.fixture(scope="module")
def sentencepiece_path(texts, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("sp") / "deep" / "small.model")
    train_sentencepiece(texts, path, 500)
    return path


@pytest.fixture(scope="module")
def hf_path(texts, tmp_path_factory) -> str:
    """A byte-level BPE as Hugging Face writes it, with one special token named like GPT-2's."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    path = str(tmp_path_factory.mktemp("hf") / "tokenizer.json")
    bpe.save(path)
    return path


@pytest.fixture(scope="module")
def everyone(sentencepiece_path, hf_path) -> list[Tokenizer]:
    return [
        ByteTokenizer(),
        SentencePieceTokenizer(sentencepiece_path),
        HuggingFaceTokenizer(hf_path),
    ]


def check_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    # Borders stand for nothing.
    bordered = [tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id]
    assert tokenizer.decode(bordered) == text
    assert tokenizer.token_num_bytes[bordered].sum() == len(text.encode())


@pytest.mark.parametrize("kind", range(3))
@given(text=TEXTS)
def test_round_trip_of_any_text(everyone, kind, text):
    check_lossless(everyone[kind], text)


@pytest.mark.parametrize("kind", range(3))
def test_round_trip_of_awkward_and_real_text(everyone, kind, texts):
    for text in AWKWARD + texts:
        check_lossless(everyone[kind], text)


@pytest.mark.parametrize("kind", range(3))
def test_tables_have_the_size_of_the_vocabulary(everyone, kind):
    tokenizer = everyone[kind]
    assert isinstance(tokenizer, Tokenizer)
    table = tokenizer.token_num_bytes
    assert table.shape == (tokenizer.vocab_size,) and table.dtype == np.int32
    assert table[tokenizer.bos_id] == table[tokenizer.eos_id] == 0
    assert load_tokenizer(tokenizer.spec).fingerprint == tokenizer.fingerprint


def test_byte_ids_are_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé").tolist() == [104, 195, 169]
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)


def test_trained_models_compress_and_know_newlines(sentencepiece_path, texts):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    assert len(tokenizer.encode(texts[0])) < 0.6 * len(texts[0].encode())
    assert tokenizer.vocab_size == 500


def test_training_is_deterministic(texts, sentencepiece_path, tmp_path):
    again = train_sentencepiece(texts, str(tmp_path / "again.model"), 500)
    assert again.fingerprint == SentencePieceTokenizer(sentencepiece_path).fingerprint
    other = train_sentencepiece(texts[:6], str(tmp_path / "other.model"), 500)
    assert other.fingerprint != again.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["again.model", "other.model"]


def test_fingerprint_hangs_on_content_not_on_the_path(sentencepiece_path, hf_path, tmp_path):
    for kind, path in (("sentencepiece", sentencepiece_path), ("hf", hf_path)):
        copy = shutil.copy(path, tmp_path / os.path.basename(path))
        assert (
            load_tokenizer(f"{kind}:{copy}").fingerprint
            == load_tokenizer(f"{kind}:{path}").fingerprint
        )
        relative = load_tokenizer(f"{kind}:{os.path.basename(path)}", base=str(tmp_path))
        assert relative.fingerprint == load_tokenizer(f"{kind}:{path}").fingerprint


def test_special_tokens_spelled_in_a_text_are_text(hf_path):
    check_lossless(HuggingFaceTokenizer(hf_path), "He wrote <|endoftext|> and went on.")


def test_borders_given_configured_and_missing(hf_path, tmp_path):
    tokenizer = HuggingFaceTokenizer(hf_path)
    assert tokenizer.bos == tokenizer.eos == "<|endoftext|>"
    given = load_tokenizer(f"hf:{hf_path},bos=a,eos=b")
    assert given.decode([given.bos_id]) == "a"
    shutil.copy(hf_path, tmp_path / "tokenizer.json")
    config = {"bos_token": {"content": "b"}, "eos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    configured = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    assert (configured.bos, configured.eos) == ("b", "a")
    one_line(lambda: load_tokenizer(f"hf:{hf_path},bos=<nope>"), "<nope>", ",bos=TOKEN")


def test_tokenizers_that_lose_bytes_are_refused(texts, hf_path, tmp_path):
    import sentencepiece

    lossy = str(tmp_path / "lossy")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=lossy, vocab_size=200, minloglevel=2
    )
    one_line(lambda: load_tokenizer(f"sentencepiece:{lossy}.model"), "unchanged", "byte_fallback")
    with open(hf_path) as file:
        description = json.load(file)
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    one_line(lambda: load_tokenizer(f"hf:{tmp_path}/tokenizer.json"), "not byte-level")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bytes", ("'bytes'", "byte | sentencepiece")),
        ("sentencepiece:", ("unknown tokenizer",)),
        ("sentencepiece:/nowhere/x.model", ("/nowhere/x.model", "check the path")),
        ("hf:/nowhere/tokenizer.json", ("/nowhere/tokenizer.json", "check the path")),
        (f"sentencepiece:{__file__}", ("no SentencePiece model",)),
        (f"hf:{__file__}", ("no Hugging Face tokenizer.json",)),
        ("hf:x.json,boss=3", ("boss=3", "bos=TOKEN")),
    ],
)
def test_bad_specs_are_one_line(spec, words):
    one_line(lambda: load_tokenizer(spec), *words)


def test_vocabularies_that_cannot_be_trained(texts, tmp_path):
    path = str(tmp_path / "x.model")
    one_line(lambda: train_sentencepiece(texts, path, 100), "at least 300")
    one_line(lambda: train_sentencepiece(["abc\n"], path, 30_000), "smaller vocabulary")
    assert not os.listdir(tmp_path)


def one_line(call, *words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
