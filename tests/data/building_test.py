"""Building: killed anywhere, gone on with, in any number of processes: the bytes are the same."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from lcl.data import building, dedup, tokenising
from lcl.data.filters import Length, Repetition
from lcl.data.journal import Journal
from lcl.data.prepare import prepare
from lcl.data.sources import SourceError
from lcl.data.store import Store
from lcl.data.testing import make_lexicon, make_text

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FILTERS = (Length(30), Repetition(0.5, 0.5))

# Runs `prepare` with small parts and dies by SIGKILL at a named moment.
CHILD = """
import os, signal, sys
from lcl.data import building, journal, prepare, store_writer
from lcl.data.filters import Length, Repetition
from lcl.data.dedup import Embedding
building.PART_BYTES, building.GIANT_BYTES = 3000, 20000
root, path, where, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def die_in(owner, name, before):
    real, calls = getattr(owner, name), [0]
    def deadly(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        value = real(*args, **kwargs)
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    setattr(owner, name, deadly)

if where == "write":
    die_in(store_writer.StoreWriter, "write", False)
elif where == "before journal":
    die_in(journal.Journal, "append", True)
elif where == "after journal":
    die_in(journal.Journal, "append", False)
elif where == "one store published":
    die_in(store_writer.StoreWriter, "_publish", False)
elif where == "before the rename":
    die_in(prepare, "_replace", True)
elif where == "after the rename":
    die_in(prepare, "_replace", False)
prepare.prepare(root=root, jsonl={"mine": path}, heldout_fraction=0.2, max_document_tokens=5000,
    filters=(Length(30), Repetition(0.5, 0.5)), near_duplicates=Embedding(0.97),
    processes=int(sys.argv[5]), log=lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """Some 160 lines: documents, copies, near copies, short ones, a giant, torn lines."""
    rng = np.random.default_rng(0)
    words = make_lexicon("any")
    texts = [make_text(rng, words, int(rng.integers(20, 120))) for _ in range(130)]
    texts += [texts[3], texts[40] + " and", texts[50].replace(".", "!", 1), "short", "again\n" * 50]
    texts.insert(20, make_text(rng, words, 6000))  # beyond GIANT_BYTES
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10:10] = ["{torn", '{"txt": "no text"}']
    lines.append("[1]")  # the last part's end
    path = tmp_path_factory.mktemp("source") / "x.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_child(root, source, where="nowhere", count=0, processes=1) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), str(source), where, str(count), str(processes)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


def files(root) -> dict[str, bytes]:
    """Every file of the domain."""
    place = pathlib.Path(root) / "mine"
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """What a run makes that nobody kills."""
    root = tmp_path_factory.mktemp("whole")
    code, output = run_child(root, source)
    assert code == 0
    ledger = json.loads(files(root)["train/meta.json"])["ledger"]
    assert ledger["dropped"] == {
        "exact duplicate": 1,
        "near duplicate": 2,
        "no JSON object": 1,
        "no text in field 'text'": 1,
        "not JSON": 1,
        "repeats itself (lines)": 1,
        "shorter than 30 characters": 1,
    }
    assert ledger["truncated"] == 1 and ledger["tokens"]["truncated"] > 0
    assert "tokens: read" in output
    return files(root)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("write", 1),
        ("write", 15),
        ("before journal", 1),  # of its head
        ("before journal", 4),
        ("after journal", 1),
        ("after journal", 6),
        ("one store published", 1),
        ("one store published", 2),
        ("before the rename", 1),
        ("after the rename", 1),
    ],
)
def test_kill_9_anywhere_and_go_on_gives_the_same_bytes(where, count, source, whole, tmp_path):
    code, _ = run_child(tmp_path, source, where, count)
    assert code == -signal.SIGKILL
    code, output = run_child(tmp_path, source)
    assert code == 0
    assert files(tmp_path) == whole
    assert sorted(os.listdir(tmp_path)) == [".lock", "mine"]
    assert "going on" in output or "up to date" in output


def test_killed_again_and_again_each_time_a_little_later(source, whole, tmp_path):
    root = tmp_path / "r"
    for _ in range(40):
        # Only new records count: each dies after six, with two processes of its own.
        code, _ = run_child(root, source, "after journal", 6, processes=2)
        if code == 0:
            break
    else:
        pytest.fail("it never comes to an end: what was done is not kept")
    assert files(root) == whole


def test_what_was_done_is_not_done_again(source, whole, tmp_path):
    run_child(tmp_path, source, "after journal", 9)
    journal = tmp_path / ".partial-mine" / "journal"
    before = journal.read_bytes()
    run_child(tmp_path, source, "after journal", 1)
    assert journal.read_bytes().startswith(before)
    assert len(journal.read_bytes()) > len(before)
    assert run_child(tmp_path, source)[0] == 0 and files(tmp_path) == whole


@pytest.mark.parametrize(
    "what", ["journal", "train.partial/tokens.npy", "heldout.partial/tokens.npy"]
)
@pytest.mark.parametrize("how", ["torn", "flipped"])
def test_what_is_torn_is_made_again(what, how, source, whole, tmp_path):
    run_child(tmp_path, source, "after journal", 12)
    path = tmp_path / ".partial-mine" / what
    data = bytearray(path.read_bytes())
    if how == "torn":
        del data[-len(data) // 3 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_child(tmp_path, source)[0] == 0
    assert files(tmp_path) == whole


def test_a_source_that_changed_is_not_gone_on_with(source, whole, tmp_path):
    other = tmp_path / "x.jsonl"
    other.write_bytes(source.read_bytes())
    run_child(tmp_path / "r", other, "after journal", 9)
    lines = source.read_text().splitlines(keepends=True)
    other.write_text("".join(lines[:5] + lines[6:]))
    code, _ = run_child(tmp_path / "r", other)
    fresh = tmp_path / "fresh"
    run_child(fresh, other)
    assert code == 0
    assert files(tmp_path / "r") == files(fresh) != whole


def test_a_change_that_leaves_size_and_time_alone_is_seen_by_the_hashes(source, whole, tmp_path):
    other = tmp_path / "x.jsonl"
    other.write_bytes(source.read_bytes())
    run_child(tmp_path / "r", other, "after journal", 9)
    stat = os.stat(other)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[2:9] = [line[:10] + line[10:].replace(b" ", b"-", 1) for line in lines[2:9]]
    other.write_bytes(b"".join(lines))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _, output = run_child(tmp_path / "r", other)
    run_child(tmp_path / "fresh", other)
    assert "going on" in output
    one, two = files(tmp_path / "r"), files(tmp_path / "fresh")
    assert one["train/tokens.npy"] == two["train/tokens.npy"] != whole["train/tokens.npy"]
    assert one == two


def test_a_journal_gives_whole_records_and_no_other(tmp_path):
    for place in range(5):
        folder = str(tmp_path / f"{place}")
        book = Journal(folder, "head")
        ends = []
        for i in range(5):
            book.append({"record": i, "data": b"x" * 50})
            ends.append(book.tell())
        book.close()
        path = pathlib.Path(folder) / "journal"
        data = bytearray(path.read_bytes())
        data[ends[place] - 20] ^= 1  # in the last bytes of a record
        path.write_bytes(data)
        book = Journal(folder, "head")
        assert [book.next()["record"] for _ in range(place)] == list(range(place))
        assert book.next() is None and book.next() is None
        book.append({"record": "new"})
        book.close()
        book = Journal(folder, "head")
        assert [book.next()["record"] for _ in range(place + 1)] == [*range(place), "new"]
        assert book.next() is None
        book.close()
        book = Journal(folder, "another head")
        assert book.next() is None
        book.close()


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_bytes(processes, source, whole, tmp_path):
    assert run_child(tmp_path, source, processes=processes)[0] == 0
    assert files(tmp_path) == whole


def test_every_document_is_there_once_or_in_the_ledger(source, whole, tmp_path):
    for name, data in whole.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    stores = [Store.open(tmp_path / split) for split in ("train", "heldout")]
    texts = [
        store.tokenizer().decode(store.document(i))
        for store in stores
        for i in range(store.num_documents)
    ]
    values = []
    for line in source.read_text().splitlines():
        try:
            values.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            pass
    kept = {text[:4998] for text in values}  # bos, 4998 bytes, eos
    assert len(set(texts)) == len(texts) and set(texts) < kept
    ledger = stores[0].meta["ledger"]
    assert ledger["read"] == len(source.read_text().splitlines())
    assert ledger["read"] == len(texts) + sum(ledger["dropped"].values())
    tokens = ledger["tokens"]
    assert tokens["stored"] == {store.split: store.num_tokens for store in stores}
    total = sum(len(value) + 2 for value in values)
    assert tokens["read"] == total
    assert total == (
        sum(tokens["stored"].values()) + sum(tokens["dropped"].values()) + tokens["truncated"]
    )
    for store in stores:
        assert store.token_num_bytes[store.tokens].sum() == store.num_bytes


def test_a_lopsided_small_source_holds_one_group_out_after_near_copies_went(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = ["one two three four five six seven", "one two three four five six seven!"]
    texts += ["a wholly different text about nothing", "another one that is like none of those"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stores = prepare(
        root=tmp_path / "r",
        jsonl={"mine": str(path)},
        heldout_fraction=1e-6,
        near_duplicates=dedup.Embedding(0.9),
        log=lambda line: None,
    )
    assert [store.num_documents for store in stores] == [2, 1]
    assert stores[0].meta["ledger"]["dropped"] == {"near duplicate": 1}


def test_limits_with_filters_stop_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    with open(path, "w") as file:
        for i in range(3000):
            print(json.dumps({"text": f"no {i}" if i % 2 else f"document {i} " * 5}), file=file)
            print("{torn", file=file)
    ledgers = []
    for processes in (1, 2):
        stores = prepare(
            root=tmp_path / f"r{processes}",
            jsonl={"mine": str(path)},
            limit_documents=20,
            heldout_fraction=0.2,
            filters=[Length(10)],
            processes=processes,
            log=lambda line: None,
        )
        assert [store.num_documents for store in stores] == [16, 4]
        ledgers.append(stores[0].meta["ledger"])
    assert ledgers[0] == ledgers[1]
    # What was read ahead of the end does not count, however far it was.
    assert 40 < ledgers[0]["read"] < 500
    assert ledgers[0]["dropped"]["shorter than 10 characters"] > 5


def test_a_worker_that_dies_is_one_line_and_can_be_gone_on_from(source, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_BYTES", 3000)
    real = tokenising._Worker.ask

    def ask(self, part):
        self._process.kill()
        return real(self, part)

    options = {"root": tmp_path, "jsonl": {"mine": str(source)}, "log": lambda line: None}
    with monkeypatch.context() as patch:
        patch.setattr(tokenising._Worker, "ask", ask)
        with pytest.raises(ValueError, match="a tokenising process died") as caught:
            prepare(processes=2, **options)
    assert "\n" not in str(caught.value)
    assert (tmp_path / ".partial-mine" / "journal").exists()
    stores = prepare(**options)
    assert sum(store.num_documents for store in stores) == 135


def test_a_filter_that_cannot_travel_is_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_BYTES", 3000)

    class Local:
        def reason(self, text):
            return None

        def settings(self):
            return {"filter": "local"}

    with pytest.raises(ValueError, match="processes=1"):
        prepare(
            root=tmp_path,
            jsonl={"mine": str(source)},
            filters=[Local()],
            processes=2,
            log=lambda line: None,
        )


def test_a_broken_source_leaves_nothing_unfinished(tmp_path):
    import gzip

    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(20000):
            print(json.dumps({"text": f"document {i} {i * i}"}), file=file)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SourceError, match="truncated gzip"):
        prepare(root=tmp_path / "r", jsonl={"mine": str(path)}, log=lambda line: None)
    assert os.listdir(tmp_path / "r") == [".lock"]
