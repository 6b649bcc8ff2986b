"""Documents: every one read is accounted for, none is on both sides of the split."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.readers import folder_documents, folder_files, jsonl_documents
from lcl.data.sources import (
    Document,
    Ledger,
    SourceError,
    first_heldout_group,
    is_heldout,
    keep_and_split,
)


def split(documents, ledger=None, **options):
    options = {"heldout_fraction": 0.3, "seed": 0, **options}
    ledger = ledger or Ledger()
    kept = list(keep_and_split(documents, ledger, **options))
    ledger.check()
    return kept


def documents(texts, **options):
    return [Document(f"d{i}", text, "s", **options) for i, text in enumerate(texts)]


@given(texts=st.lists(st.text(max_size=8), max_size=30), seed=st.integers(0, 5))
def test_the_ledger_accounts_for_every_document(texts, seed):
    ledger = Ledger()
    kept = split(documents(texts), ledger, seed=seed, min_characters=2)
    assert ledger.read == len(texts)
    assert sum(ledger.stored.values()) == len(kept)
    assert len({document.text for _, document in kept}) == len(kept)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_each_reason_is_counted():
    ledger = Ledger()
    texts = ["a long text", "", "  \n", "short", "a long text", "nul\0nul nul", "half \ud800 half"]
    kept = split(documents(texts), ledger, min_characters=6)
    assert [document.name for _, document in kept] == ["d0"]
    assert dict(ledger.dropped) == {
        "empty": 2,
        "shorter than 6 characters": 1,
        "exact duplicate": 1,
        "null bytes (not text)": 1,
        "half a surrogate pair (not Unicode text)": 1,
    }
    assert "read 7" in str(ledger) and "1 exact duplicate" in str(ledger)


@given(st.sets(st.text(min_size=1, max_size=6), max_size=40), st.text(min_size=1, max_size=6))
def test_adding_a_document_moves_no_other(names, another):
    def sides(names):
        return {d.name: side for side, d in split([Document(n, "t:" + n, "s") for n in names])}

    before, after = sides(sorted(names)), sides(sorted(names | {another}))
    assert before.items() <= after.items()


def test_a_group_is_on_one_side_whatever_the_language():
    pages = [f"page{i}.1" for i in range(200)]
    sides = [
        {d.group: side for side, d in split([Document(p, p + lang, lang, group=p) for p in pages])}
        for lang in ("en", "fr")
    ]
    assert sides[0] == sides[1]
    assert set(sides[0].values()) == {"train", "heldout"}


def test_the_share_held_out_is_the_fraction_and_hangs_on_the_seed():
    held = {i for i in range(20_000) if is_heldout(str(i), 0.05, 0)}
    assert 0.045 < len(held) / 20_000 < 0.055
    assert held < {i for i in range(20_000) if is_heldout(str(i), 0.1, 0)}
    assert held != {i for i in range(20_000) if is_heldout(str(i), 0.05, 1)}


def test_duplicates_go_before_the_split():
    kept = split(documents(["same text"] * 50 + ["other"]))
    assert len(kept) == 2


def test_a_small_corpus_can_still_be_split():
    few = documents(["one", "two", "three"])
    group = first_heldout_group(few, seed=0)
    sides = [side for side, _ in split(few, only_heldout=group)]
    assert sorted(sides) == ["heldout", "train", "train"]
    assert first_heldout_group(few[:1] * 5, seed=0) is None


def test_ids_are_stable_and_63_bits():
    assert Document("a", "x", "s").id == Document("a", "other text", "s", group="g").id
    assert Document("a", "x", "s").id != Document("b", "x", "s").id
    assert all(0 <= Document(str(i), "", "s").id < 2**63 for i in range(1000))


# ---- folders


def test_a_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("deux")
    (tmp_path / "One.TXT").write_bytes(b"\xef\xbb\xbfun")
    (tmp_path / "three.rst").write_text("trois")
    read = list(folder_documents(str(tmp_path), Ledger()))
    assert [(d.name, d.text) for d in read] == [("One.TXT", "un"), ("b/two.md", "deux")]
    pattern = os.path.join(str(tmp_path), "**", "*.rst")
    assert [d.text for d in folder_documents(pattern, Ledger())] == ["trois"]


def test_bad_files_are_counted_and_links_not_followed(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "link.txt").symlink_to(tmp_path / "good.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    ledger = Ledger()
    assert [d.name for d in folder_documents(str(tmp_path), ledger)] == ["good.txt"]
    assert dict(ledger.dropped) == {"not UTF-8": 1, "symbolic link": 1}


def test_a_folder_without_text_says_what_to_do(tmp_path):
    one_line(lambda: folder_files(str(tmp_path)), "no file", "*.txt or *.md")
    one_line(lambda: folder_files(str(tmp_path / "none")), "no folder")
    one_line(lambda: folder_files(str(tmp_path / "*.rst")), "no file")


# ---- jsonl


def test_jsonl_lines_are_documents_plain_and_packed(tmp_path):
    lines = "".join(json.dumps({"text": f"text {i}", "n": i}) + "\n" for i in range(5)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    read = list(jsonl_documents(str(tmp_path), Ledger()))
    assert [d.name for d in read[::5]] == ["a.jsonl:1", "b.jsonl.gz:1"]
    assert (
        [d.text for d in read[:5]] == [d.text for d in read[5:]] == [f"text {i}" for i in range(5)]
    )


def test_bad_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": "torn\n\xff\xfe\n[1]\n{"body": "x"}\n{"text": 3}\n'
        + b"[" * 100_000
        + b"\n"
    )
    ledger = Ledger()
    assert [d.text for d in jsonl_documents(str(path), ledger)] == ["good"]
    assert dict(ledger.dropped) == {
        "not JSON": 2,
        "not UTF-8": 1,
        "no JSON object": 1,
        "no text in field 'text'": 2,
    }


def test_a_file_that_is_no_use_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "title": "y"}\n' * 3)
    one_line(lambda: list(jsonl_documents(str(path), Ledger())), "body, title", "rename")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "hello"}\n' * 10_000)[:-20])
    one_line(lambda: list(jsonl_documents(str(packed), Ledger())), "truncated", "copy it again")
    packed.write_bytes(b"no gzip at all")
    one_line(lambda: list(jsonl_documents(str(packed), Ledger())), "cannot be read")
    one_line(lambda: list(jsonl_documents(str(tmp_path / "c.jsonl"), Ledger())), "no file")


def one_line(call, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
