"""prepare: idempotent, atomic, accounted for; its complaints are one line."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lcl.data import corpora as registry
from lcl.data import prepare as prepare_module
from lcl.data.corpora.corpus import CorpusInfo
from lcl.data.domains import name_and_split
from lcl.data.prepare import prepare, show
from lcl.data.sources import Document
from lcl.data.store import Data, Store, StoreWriter
from lcl.data.testing import make_lexicon, make_text

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """40 text files in two folders."""
    rng = np.random.default_rng(0)
    words = make_lexicon("any")
    path = tmp_path / "text"
    for i in range(40):
        file = path / f"part{i % 2}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{i}. " + make_text(rng, words, 60))
    return path


def texts(stores) -> dict[str, set[str]]:
    return {
        store.split: {
            store.tokenizer().decode(store.document(i)) for i in range(store.num_documents)
        }
        for store in stores
    }


def test_a_folder_becomes_two_stores(folder, tmp_path):
    (folder / "copy.txt").write_text((folder / "part0" / "0.txt").read_text())
    (folder / "bad.txt").write_bytes(b"\xff\xff")
    lines: list[str] = []
    stores = prepare(
        root=tmp_path / "r", folders={"mine": str(folder)}, heldout_fraction=0.2, log=lines.append
    )
    both = texts(stores)
    want = {(folder / f"part{i % 2}" / f"{i}.txt").read_text() for i in range(40)}
    assert both["train"] | both["heldout"] == want and not both["train"] & both["heldout"]
    ledger = stores[0].meta["ledger"]
    assert ledger["read"] == 42
    assert ledger["dropped"] == {"exact duplicate": 1, "not UTF-8": 1}
    assert ledger["stored"] == {s.split: s.num_documents for s in stores}
    assert "read 42" in lines[-1]
    assert [s.domain for s in stores] == ["mine", "mine"]
    assert sorted(os.listdir(tmp_path / "r")) == [".lock", "mine"]


def test_jsonl_with_bad_lines(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    lines = [json.dumps({"text": f"Document number {i}."}) for i in range(30)]
    with gzip.open(path, "wt") as file:
        file.write("\n".join([*lines, "{torn", lines[3], ""]))
    stores = prepare(root=tmp_path / "r", jsonl={"mine": str(path)}, log=lambda line: None)
    assert sum(store.num_documents for store in stores) == 30
    assert stores[0].meta["ledger"]["dropped"] == {"exact duplicate": 1, "not JSON": 1}
    assert stores[0].source_names == ["x.jsonl.gz"]


def test_the_second_time_nothing_is_done_until_something_changes(folder, tmp_path):
    lines: list[str] = []

    def go(**options) -> Store:
        lines.clear()
        return prepare(
            root=tmp_path / "r", folders={"mine": str(folder)}, log=lines.append, **options
        )[0]

    first = go()
    before = os.stat(tmp_path / "r" / "mine" / "train" / "meta.json").st_mtime_ns
    assert go().fingerprint == first.fingerprint and lines == ["mine: up to date"]
    assert os.stat(tmp_path / "r" / "mine" / "train" / "meta.json").st_mtime_ns == before
    assert go(force=True).fingerprint == first.fingerprint
    assert os.stat(tmp_path / "r" / "mine" / "train" / "meta.json").st_mtime_ns > before
    (folder / "new.txt").write_text("A new document.")
    assert go().fingerprint != first.fingerprint and "changed" in lines[0]
    assert go(heldout_fraction=0.4, seed=3).num_documents < first.num_documents
    os.utime(folder / "new.txt", ns=(1, 1))
    touched = go(heldout_fraction=0.4, seed=3)
    assert "changed" in lines[0]
    assert touched.fingerprint == go(heldout_fraction=0.4, seed=3).fingerprint


def test_moving_the_text_does_not_change_the_fingerprint(folder, tmp_path):
    one = prepare(root=tmp_path / "a", folders={"mine": str(folder)}, log=lambda line: None)
    os.rename(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "deep")
    (tmp_path / "parent").mkdir()
    (tmp_path / "deep").rename(tmp_path / "parent" / "text")
    two = prepare(
        root=tmp_path / "b", folders={"mine": str(tmp_path / "parent/text")}, log=lambda line: None
    )
    assert [s.fingerprint for s in one] == [s.fingerprint for s in two]


def test_kill_9_at_any_moment_leaves_the_old_stores_or_the_new(folder, tmp_path):
    root = tmp_path / "r"
    old = prepare(root=root, folders={"mine": str(folder)}, log=lambda line: None)
    for i in range(400):
        (folder / f"more{i}.txt").write_text(f"{i} more text " * 500)
    code = (
        "import sys\nfrom lcl.data.prepare import prepare\nprint('go', flush=True)\n"
        "prepare(root=sys.argv[1], folders={'mine': sys.argv[2]}, force=True)\n"
    )
    command = [sys.executable, "-c", code, str(root), str(folder)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    rng = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        data = Data(str(root))
        assert data.domains() in (["mine"], [])  # [] between two renames: the next call mends it.
        if data.domains():
            store = data.open("mine")
            assert store.tokens.shape == (store.num_tokens,)
            assert store.offsets[-1] == store.num_tokens
    new = prepare(root=root, folders={"mine": str(folder)}, log=lambda line: None)
    assert sum(s.num_documents for s in new) == 440
    assert new[0].fingerprint != old[0].fingerprint
    assert sorted(os.listdir(root)) == [".lock", "mine"]


def test_what_a_kill_between_the_two_renames_left_is_mended(folder, tmp_path):
    root = tmp_path / "r"
    (store, _) = prepare(root=root, folders={"mine": str(folder)}, log=lambda line: None)
    os.rename(root / "mine", root / ".old-mine")
    (root / ".partial-mine").mkdir()
    lines: list[str] = []
    (again, _) = prepare(root=root, folders={"mine": str(folder)}, log=lines.append)
    assert again.fingerprint == store.fingerprint and lines == ["mine: up to date"]
    assert sorted(os.listdir(root)) == [".lock", "mine"]


def test_a_full_disk_is_one_line_and_loses_nothing(folder, tmp_path, monkeypatch):
    root = tmp_path / "r"
    (store, _) = prepare(root=root, folders={"mine": str(folder)}, log=lambda line: None)

    def full(self, ids):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, "write", full)
    one_line(
        lambda: prepare(
            root=root, folders={"mine": str(folder)}, force=True, log=lambda line: None
        ),
        "No space left",
        "make room",
    )
    assert Data(str(root)).open("mine").fingerprint == store.fingerprint
    assert sorted(os.listdir(root)) == [".lock", ".partial-mine", "mine"]  # to go on with


def test_a_root_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "r"
    one_line(lambda: prepare(root=root, folders={"mine": str(folder)}), "choose another root")


def test_limits_bound_both_splits(folder, tmp_path):
    stores = prepare(
        root=tmp_path / "r",
        folders={"mine": str(folder)},
        heldout_fraction=0.3,
        limit_documents=10,
        log=lambda line: None,
    )
    assert [store.num_documents for store in stores] == [7, 3]
    ledger = stores[0].meta["ledger"]
    assert ledger["read"] == sum(ledger["stored"].values()) + sum(ledger["dropped"].values())


def test_a_corpus_goes_through_the_same_door(tmp_path, monkeypatch):
    def read(packages, ledger):
        for i in range(50):
            yield Document(f"d{i}", f"text {i} " * 40, "made up")
        yield Document("short", "short", "made up")

    info = CorpusInfo("tiny", "made up", "en", "CC0-1.0", read)
    monkeypatch.setattr(registry, "_registry", lambda: {"tiny": info})
    lines: list[str] = []

    def go(**options):
        return prepare(
            ["tiny"],
            root=tmp_path / "r",
            cache_dir=str(tmp_path / "c"),
            log=lines.append,
            **options,
        )

    stores = go(heldout_fraction=0.2)
    assert sum(store.num_documents for store in stores) == 50
    assert stores[0].meta["ledger"]["dropped"] == {"shorter than 200 characters": 1}
    assert stores[0].meta["licence"] == "CC0-1.0"
    few = go(heldout_fraction=0.2, limit_documents=5)
    assert [store.num_documents for store in few] == [4, 1]
    assert few[0].meta["ledger"]["dropped"]["over limit_documents"] == 45
    one_line(lambda: prepare(["tinny"], root=tmp_path / "r"), "did you mean 'tiny'")
    one_line(
        lambda: prepare(root=tmp_path / "r", folders={"tiny": str(tmp_path)}), "choose another"
    )


def test_sentencepiece_is_trained_on_the_training_text_and_kept_in_the_root(folder, tmp_path):
    root = tmp_path / "r"
    options = {"root": root, "tokenizer": "sentencepiece:400", "log": lambda line: None}
    (train, heldout) = prepare(folders={"mine": str(folder)}, **options)
    assert train.vocab_size == 400
    assert train.meta["tokenizer_spec"] == "sentencepiece:tokenizer/sentencepiece-400.model"
    assert train.token_num_bytes[train.tokens].sum() == train.num_bytes
    assert (
        texts([train, heldout])["train"]
        == {text for text in (f.read_text() for f in folder.rglob("*.txt"))}
        - texts([train, heldout])["heldout"]
    )
    # A second domain uses the model that is there.
    (tmp_path / "b").mkdir()
    for i in range(3):
        (tmp_path / "b" / f"{i}.txt").write_text(f"Other text, {i}.")
    (other, _) = prepare(folders={"other": str(tmp_path / "b")}, **options)
    assert other.tokenizer_fingerprint == train.tokenizer_fingerprint
    # The root is self-contained: it can be moved.
    os.rename(root, tmp_path / "moved")
    moved = Data(str(tmp_path / "moved"))
    assert moved.domains() == ["mine", "other"]
    assert (
        moved.tokenizer().decode(moved.open("mine").document(0))
        in texts([moved.open("mine")])["train"]
    )
    # Another tokenizer does not get in.
    for spec in ("byte", "sentencepiece:500"):
        one_line(
            lambda spec=spec: prepare(
                folders={"third": str(folder)}, root=tmp_path / "moved", tokenizer=spec
            ),
            "differs",
            "another --root",
        )
    # Unless every store is made again with it.
    stores = prepare(
        folders={"mine": str(folder), "other": str(tmp_path / "b")},
        root=tmp_path / "moved",
        force=True,
        log=lambda line: None,
    )
    assert {store.vocab_size for store in stores} == {258}
    # A model from elsewhere is copied into the root.
    model = tmp_path / "moved" / "tokenizer" / "sentencepiece-400.model"
    (copied, _) = prepare(
        folders={"mine": str(folder)},
        root=tmp_path / "third",
        tokenizer=f"sentencepiece:{model}",
        log=lambda line: None,
    )
    assert copied.fingerprint == train.fingerprint
    assert (tmp_path / "third" / "tokenizer").is_dir()


def test_own_text_that_cannot_be_split_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("The only document.")
    one_line(
        lambda: prepare(root=tmp_path / "r", folders={"mine": str(tmp_path)}),
        "1 document",
        "cut the document",
    )
    (tmp_path / "one.txt").write_text("")
    one_line(
        lambda: prepare(root=tmp_path / "r", folders={"mine": str(tmp_path)}),
        "no document",
        "1 empty",
    )
    (tmp_path / "two.txt").write_text("text")
    (tmp_path / "three.txt").write_text("more text")
    stores = prepare(root=tmp_path / "r", folders={"mine": str(tmp_path)}, log=lambda line: None)
    assert [store.num_documents for store in stores] == [1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("nothing to prepare",)),
        ({"heldout_fraction": 0.0}, ("0.0", "between 0 and 1")),
        ({"limit_documents": 1}, ("at least 2",)),
        ({"folders": {"a/b": "."}}, ("'a/b'", "letters")),
        ({"folders": {".x": "."}}, ("'.x'", "letters")),
        ({"folders": {"tokenizer": "."}}, ("'tokenizer'",)),
        ({"folders": {"a": "."}, "jsonl": {"a": "x"}}, ("named twice",)),
        ({"folders": {"a": "/nowhere"}}, ("/nowhere", "give a folder")),
        ({"jsonl": {"a": "/nowhere.jsonl"}}, ("/nowhere.jsonl", "give a .jsonl")),
        ({"corpora": ["pyton"]}, ("did you mean 'python'",)),
        ({"corpora": ["python"], "tokenizer": "bite"}, ("'bite'", "byte | ")),
    ],
)
def test_bad_requests_are_one_line(options, words, tmp_path):
    one_line(lambda: prepare(root=tmp_path / "r", **options), *words)


def test_a_document_of_many_megabytes_is_stored(tmp_path):
    line = "A line of the long document, which has many of them.\n"
    (tmp_path / "long.txt").write_text(line * 400_000)
    (tmp_path / "short.txt").write_text("A short document.")
    stores = prepare(root=tmp_path / "r", folders={"mine": str(tmp_path)}, log=lambda line: None)
    assert sum(store.num_bytes for store in stores) == 400_000 * len(line) + 17
    longest = max(stores, key=lambda store: store.num_tokens)
    assert longest.tokens[-len(line) - 1 : -1].astype(np.uint8).tobytes().decode() == line


def test_show_is_a_table_with_ledgers(folder, tmp_path):
    assert "no stores" in show(tmp_path / "r")
    (train, heldout) = prepare(root=tmp_path / "r", folders={"mine": str(folder)}, log=print)
    table = show(tmp_path / "r")
    assert "tokenizer byte, 258 ids" in table
    rows = [line.split() for line in table.splitlines() if line.startswith("mine ")]
    assert [row[1:4] for row in rows] == [
        ["train", f"{train.num_documents}", f"{train.num_tokens:,}"],
        ["heldout", f"{heldout.num_documents}", f"{heldout.num_tokens:,}"],
    ]
    assert "mine: read 40 = " in table


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert prepare_module.default_cache_dir() == "/somewhere/lcl"


def one_line(call, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_everything_from_the_command_line(folder, tmp_path, capsys):
    from lcl import main

    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"body": f"number {i} " * 9}) + "\n" for i in range(20)))
    words = ["prepare", "--root", str(tmp_path / "r"), "--jsonl", f"a={lines}"]
    words += ["--text_field", "body", "--filter", "length:5:5000", "--filter", "script:Latin"]
    words += ["--near_duplicates", "embedding:0.999", "--max_document_tokens", "60"]
    assert main.main([*words, "--processes", "1", "--heldout_fraction", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "tokens: read" in out and "20 truncated" in out
    assert main.main(words[:-2] + ["--filter", "lenght:3"]) == 2
    assert main.main([*words, "--module", "no_such_module_of_ours"]) == 2
    assert main.main(["prepare", "--root", str(tmp_path / "r")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and "'lenght'" in err[0] and "no_such_module_of_ours" in err[1]
    assert "--parquet" in err[2]


@pytest.mark.parametrize(
    ("place", "want"),
    [
        ("our_task", ("our_task", "train")),
        ("our_task:test", ("our_task", "test")),
        ("c4/en:3.1.0", ("c4/en:3.1.0", "train")),
        ("c4/en:3.1.0:train[:10%]", ("c4/en:3.1.0", "train[:10%]")),
        ("/data/c4/3.1.0:test", ("/data/c4/3.1.0", "test")),
        ("C:/data/c4", ("C:/data/c4", "train")),
    ],
)
def test_a_split_at_the_end_of_a_name(place, want):
    assert name_and_split(place) == want
