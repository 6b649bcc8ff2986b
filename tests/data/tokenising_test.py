"""Tokenising in parts: the same as one document at a time, in any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data import tokenising
from lcl.data.filters import Length
from lcl.data.tokenising import Part, Work, Workers, encode_part
from lcl.data.tokenizers import ByteTokenizer, train_sentencepiece

BYTE = ByteTokenizer()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    texts = ["the quick brown fox jumps over the lazy dog " * 20, "naïve café \u2581 日本語 " * 30]
    return train_sentencepiece(texts, str(tmp_path_factory.mktemp("sp") / "x.model"), 320)


def part(texts, fit=None) -> Part:
    return Part([text.encode() for text in texts], fit or [True] * len(texts))


@given(
    texts=st.lists(st.text(alphabet="ab \né\u2581日", max_size=30), min_size=1, max_size=8),
    fit=st.lists(st.booleans(), min_size=8, max_size=8),
    most=st.one_of(st.none(), st.integers(3, 12)),
)
def test_a_part_is_its_documents_one_by_one(sentencepiece, texts, fit, most):
    for tokenizer in (BYTE, sentencepiece):
        work = Work(tokenizer, (Length(2),), max_tokens=most)
        got = encode_part(work, part(texts, fit[: len(texts)]))
        want: list[int] = []
        for i, text in enumerate(texts):
            ids = tokenizer.encode(text).tolist()
            kept = ids if most is None else ids[: most - 2]
            assert got.num_tokens[i] == len(kept) + 2
            assert got.cut[i] == len(ids) - len(kept)
            assert got.num_bytes[i] == tokenizer.token_num_bytes[kept].sum()
            short = len(text.strip()) < 2
            assert (got.reasons[i] is not None) == (fit[i] and short)
            if fit[i] and not short:
                want += [tokenizer.bos_id, *kept, tokenizer.eos_id]
        assert got.tokens.tolist() == want and got.tokens.dtype == np.uint16


def test_several_processes_give_the_same_in_the_same_order(sentencepiece):
    parts = [(i, part([f"part {i} text {j} " * (1 + i % 5) for j in range(20)])) for i in range(25)]
    work = Work(sentencepiece, (Length(3),))
    with Workers(work, 1) as one, Workers(work, 3) as three:
        alone, together = list(one.map(iter(parts))), list(three.map(iter(parts)))
    assert [tag for tag, _ in together] == list(range(25))
    for (_, a), (_, b) in zip(alone, together, strict=True):
        assert a.tokens.tobytes() == b.tokens.tobytes()
        assert a.reasons == b.reasons and (a.num_bytes == b.num_bytes).all()


def test_parts_are_read_no_further_than_needed(sentencepiece):
    read = []

    def parts():
        for i in range(1000):
            read.append(i)
            yield i, part([f"text {i}"])

    with Workers(Work(sentencepiece), 2) as workers:
        results = workers.map(parts())
        for _ in range(5):
            next(results)
        assert len(read) < 20


def test_workers_end_with_their_parent(run_python):
    code = """
import os, signal, time
from lcl.data.tokenising import *
from lcl.data.tokenizers import ByteTokenizer
workers = Workers(Work(ByteTokenizer()), 2)
results = workers.map((i, Part([b"x"], [True])) for i in range(100))
next(results)
print(*[worker._process.pid for worker in workers._all], flush=True)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
os._exit(9 - 9)  # without a word to the workers, as SIGKILL would
"""
    pids = [int(word) for word in run_python(code).split()]
    assert len(pids) == 2
    import os
    import time

    for _ in range(200):
        alive = [pid for pid in pids if os.path.exists(f"/proc/{pid}/cmdline")]
        alive = [pid for pid in alive if b"tokenising" in _command(pid)]
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"still there: {alive}")


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def test_bad_numbers():
    with pytest.raises(ValueError, match="processes 0"):
        Workers(Work(BYTE), 0)


def test_long_documents_are_encoded_in_pieces(monkeypatch, sentencepiece):
    text = "the lazy dog\n" * 500
    whole = encode_part(Work(sentencepiece), part([text, "short"]))
    monkeypatch.setattr(tokenising, "CHUNK_CHARACTERS", 100)
    pieces = encode_part(Work(sentencepiece), part([text, "short"]))
    assert sentencepiece.decode(pieces.tokens) == sentencepiece.decode(whole.tokens)
    assert pieces.num_bytes.tolist() == whole.num_bytes.tolist() == [len(text), 5]
