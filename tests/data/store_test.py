"""Stores: what is written is read, what is half-written is not there, what is wrong says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data import tokenising
from lcl.data.store import Data, Store, StoreError, StoreWriter
from lcl.data.testing import make_stores
from lcl.data.tokenizers import ByteTokenizer

DOCUMENTS = [("hello", 7, "a"), ("", 8, "b"), ("日本\n", 9, "a")]


class WideTokenizer(ByteTokenizer):
    """Bytes with a vocabulary that needs 32 bits."""

    spec = "wide"
    vocab_size = 70_000
    bos_id = 69_998
    eos_id = 69_999
    fingerprint = "wide"
    token_num_bytes = np.ones(70_000, np.int32)


def write(path, documents=DOCUMENTS, *, tokenizer=None, split="train", **options) -> Store:
    options = {"domain": "en", **options}
    with StoreWriter(path, tokenizer=tokenizer or ByteTokenizer(), split=split, **options) as w:
        for text, i, source in documents:
            w.add(text, document_id=i, source=source)
    return Store.open(path)


def test_what_is_written_is_read(tmp_path):
    store = write(tmp_path / "en" / "train", licence="CC0-1.0")
    assert store.offsets.tolist() == [0, 7, 9, 18]
    assert store.lengths.tolist() == [7, 2, 9]
    assert store.document_ids.tolist() == [7, 8, 9]
    assert store.document_bytes.tolist() == [5, 0, 7]
    assert [store.source_names[i] for i in store.sources] == ["a", "b", "a"]
    assert store.document(0).tolist() == [256, *b"hello", 257]
    assert store.document(1).tolist() == [256, 257]
    assert store.tokenizer().decode(store.document(2)) == "日本\n"
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (3, 18, 12)
    assert store.token_num_bytes[store.tokens].sum() == store.num_bytes
    assert store.tokens.dtype == np.uint16 and isinstance(store.tokens, np.memmap)
    assert (store.domain, store.split, store.vocab_size) == ("en", "train", 258)
    assert store.meta["licence"] == "CC0-1.0"
    for index in (-1, 3):
        with pytest.raises(IndexError, match="it has 3"):
            store.document(index)


def test_large_vocabularies_get_32_bits(tmp_path):
    store = write(tmp_path / "s", tokenizer=WideTokenizer())
    assert store.tokens.dtype == np.uint32
    assert store.document(0)[0] == 69_998


def test_extras_are_kept_for_each_document(tmp_path):
    path = tmp_path / "s"
    with StoreWriter(path, tokenizer=ByteTokenizer(), domain="d", split="train") as writer:
        for i in range(3):
            writer.add("x", document_id=i, extras={"language_share": i / 2})
    store = Store.open(path)
    assert store.extra("language_share").tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(StoreError, match="it has language_share"):
        store.extra("other")


def test_fingerprint_hangs_on_everything_that_matters_and_on_nothing_else(tmp_path):
    same = [write(tmp_path / name).fingerprint for name in ("one", "two")]
    assert same[0] == same[1]
    text, i, source = DOCUMENTS[0]
    others = [
        write(tmp_path / "3", [("hellO", i, source), *DOCUMENTS[1:]]),
        write(tmp_path / "4", [(text, 70, source), *DOCUMENTS[1:]]),
        write(tmp_path / "5", [(text, i, "c"), *DOCUMENTS[1:]]),
        write(tmp_path / "6", DOCUMENTS[::-1]),
        write(tmp_path / "7", split="heldout"),
        write(tmp_path / "8", domain="fr"),
        write(tmp_path / "9", settings={"seed": 1}),
        write(tmp_path / "10", [("hell", 7, "a"), ("o", 8, "b"), ("日本\n", 9, "a")]),
    ]
    assert len({same[0], *(store.fingerprint for store in others)}) == 9
    assert write(tmp_path / "11", inputs="another time").fingerprint == same[0]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="oops"):
        with StoreWriter(
            tmp_path / "s", tokenizer=ByteTokenizer(), domain="d", split="train"
        ) as writer:
            writer.add("hello", document_id=0)
            raise RuntimeError("oops")
    assert os.listdir(tmp_path) == []


def test_a_store_is_never_overwritten(tmp_path):
    before = write(tmp_path / "s").fingerprint
    with pytest.raises(StoreError, match="already at"):
        write(tmp_path / "s", [("other", 1, "a")])
    assert Store.open(tmp_path / "s").fingerprint == before
    assert os.listdir(tmp_path) == ["s"]


def test_kill_9_while_writing_leaves_no_domain(tmp_path):
    code = (
        "import sys, itertools\n"
        "from lcl.data.store import StoreWriter\n"
        "from lcl.data.tokenizers import ByteTokenizer\n"
        "new = dict(tokenizer=ByteTokenizer(), domain='d', split='train')\n"
        "with StoreWriter(sys.argv[1], **new) as w:\n"
        "    for i in itertools.count():\n"
        "        w.add('text ' * 100, document_id=i)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "d" / "train")],
        env=os.environ | {"PYTHONPATH": root},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("d/train.partial-*/tokens.npy")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert Data(str(tmp_path)).domains() == []
    assert not (tmp_path / "d" / "train").exists()
    write(tmp_path / "d" / "train")
    assert Data(str(tmp_path)).domains() == ["d"]


@given(
    text=st.text(alphabet="ab \n\té", max_size=400), chunk=st.integers(min_value=1, max_value=50)
)
def test_long_texts_are_cut_without_loss(text, chunk):
    before = tokenising.CHUNK_CHARACTERS
    tokenising.CHUNK_CHARACTERS = chunk
    try:
        pieces = list(tokenising.pieces(text))
    finally:
        tokenising.CHUNK_CHARACTERS = before
    assert "".join(pieces) == text
    assert all(len(piece) <= chunk for piece in pieces)


def test_a_long_document_is_stored_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "CHUNK_CHARACTERS", 1000)
    text = "one line é\n  and a second\n" * 2000
    store = write(tmp_path / "s", [(text, 0, "a")])
    assert store.tokenizer().decode(store.document(0)) == text
    assert store.document_bytes[0] == len(text.encode())


def test_data_opens_its_domains(tmp_path):
    data = make_stores(tmp_path / "r", {"en": 10, "fr": 5})
    assert data.domains() == ["en", "fr"]
    assert (data.open("en").num_documents, data.open("en", "heldout").num_documents) == (8, 2)
    assert data.tokenizer().spec == "byte"
    again = make_stores(tmp_path / "again", {"fr": 5, "en": 10})
    for split in ("train", "heldout"):
        assert data.open("fr", split).fingerprint == again.open("fr", split).fingerprint
    assert make_stores(tmp_path / "other", {"en": 10}, seed=1).open("en").fingerprint not in (
        data.open("en").fingerprint
    )


def test_wrong_questions_are_answered_in_one_line(tmp_path):
    data = make_stores(tmp_path / "r", {"manpages-en": 4, "manpages-fr": 4})
    one_line(lambda: data.open("manpage-fr"), "did you mean 'manpages-fr'", "manpages-en")
    one_line(lambda: data.open("manpages-en", "test"), "train or heldout")
    one_line(lambda: Data(str(tmp_path / "none")).open("x"), "there are none yet", "lcl prepare")
    one_line(lambda: Data(str(tmp_path / "none")).tokenizer(), "lcl prepare")
    one_line(lambda: Store.open(tmp_path / "none"), "lcl prepare")
    with pytest.raises(ValueError, match="train or heldout"):
        StoreWriter(tmp_path / "x", tokenizer=ByteTokenizer(), domain="x", split="dev")


def test_stores_of_one_root_share_a_tokenizer(tmp_path):
    data = make_stores(tmp_path / "r", {"en": 4})
    write(tmp_path / "r" / "wide" / "train", tokenizer=WideTokenizer())
    one_line(lambda: data.open("en"), "different tokenizers", "byte", "wide")


def test_damage_is_named(tmp_path):
    store = write(tmp_path / "s")
    os.truncate(tmp_path / "s" / "tokens.npy", 140)
    one_line(lambda: Store.open(store.path).tokens, "tokens.npy", "torn")
    meta = tmp_path / "s" / "meta.json"
    meta.write_text(json.dumps(dict(store.meta) | {"format": 99}))
    one_line(lambda: Store.open(store.path), "format 99")
    meta.write_text("{")
    one_line(lambda: Store.open(store.path), "torn")


def one_line(call, *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
