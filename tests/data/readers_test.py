"""Readers: whatever is wrong with the input is a counted drop or an error of one line."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from lcl.data import building
from lcl.data.prepare import prepare
from lcl.data.readers import (
    Meter,
    arrayrecord_documents,
    jsonl_documents,
    parquet_documents,
)
from lcl.data.sources import Ledger

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TEXTS = [f"Document number {i}, of some words." for i in range(30)]


def as_lines(values) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def pack_zst(data: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def write_arrayrecord(path, records) -> str:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def make(kind: str, path: pathlib.Path, texts=TEXTS, field="text") -> str:
    """A file of that kind that holds the texts."""
    lines = as_lines({field: text, "n": i} for i, text in enumerate(texts))
    file = path / f"x.{kind}"
    if kind == "jsonl":
        file.write_bytes(lines)
    elif kind == "jsonl.gz":
        file.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":  # two frames
        half = len(lines) // 2
        file.write_bytes(pack_zst(lines[:half]) + pack_zst(lines[half:]))
    elif kind == "parquet":
        table = pyarrow.table({field: list(texts), "n": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, file, row_group_size=7)
    else:
        write_arrayrecord(file, lines.splitlines())
    return str(file)


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record"]
OPTION = {"parquet": "parquet", "array_record": "arrayrecord"}
READERS = {"parquet": parquet_documents, "array_record": arrayrecord_documents}


def read(kind: str, path: str, ledger: Ledger | None = None, **options) -> list[str]:
    reader = READERS.get(kind, jsonl_documents)
    return [document.text for document in reader(path, ledger or Ledger(), **options)]


def stores_of(kind: str, path: str, root, **options):
    own = {OPTION.get(kind, "jsonl"): {"mine": path}}
    return prepare(root=root, log=lambda line: None, **own, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(kind, tmp_path):
    path = make(kind, tmp_path)
    meter = Meter()
    assert read(kind, path, meter=meter) == TEXTS
    assert meter.done == pathlib.Path(path).stat().st_size
    assert read(kind, str(tmp_path)) == TEXTS  # the folder
    assert read(kind, str(tmp_path / "*")) == TEXTS  # a pattern
    stores = stores_of(kind, path, tmp_path / "r")
    assert sum(store.num_documents for store in stores) == len(TEXTS)
    (tmp_path / "other").mkdir()
    other = make(kind, tmp_path / "other", field="body")
    assert read(kind, other, field="body") == TEXTS
    again = stores_of(kind, other, tmp_path / "r2", text_field="body")
    assert sum(store.num_documents for store in again) == len(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_field_names_the_fields_there_are(kind, tmp_path):
    path = make(kind, tmp_path, field="body")
    one_line(
        lambda: read(kind, path), "'text'", "body", "n", "--text_field", pathlib.Path(path).name
    )
    one_line(lambda: stores_of(kind, path, tmp_path / "r"), "--text_field")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "array_record"])
def test_a_file_that_is_cut_short_is_an_error(kind, tmp_path):
    path = pathlib.Path(make(kind, tmp_path, [f"{i} {i * i} words {i**3}" for i in range(5000)]))
    path.write_bytes(path.read_bytes()[:-100])
    one_line(lambda: stores_of(kind, str(path), tmp_path / "r"), path.name, "copy it again")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "array_record"])
def test_rubbish_is_an_error(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"this is no such file, whatever it is called, and so on and so forth" * 9)
    one_line(lambda: stores_of(kind, str(path), tmp_path / "r"), path.name, "copy it again")


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_never_silence(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"")
    one_line(lambda: stores_of(kind, str(path), tmp_path / "r"), "x.")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_documents_are_counted(kind, tmp_path):
    texts = [*TEXTS, "nul\0byte", "", "   ", TEXTS[0], "café \U0001f600"]
    stores = stores_of(kind, make(kind, tmp_path, texts), tmp_path / "r")
    assert sum(store.num_documents for store in stores) == len(TEXTS) + 1
    ledger = stores[0].meta["ledger"]
    assert ledger["dropped"] == {"null bytes (not text)": 1, "empty": 2, "exact duplicate": 1}
    assert ledger["read"] == len(texts)
    tokens = ledger["tokens"]
    assert tokens["dropped"]["null bytes (not text)"] == len("nul\0byte") + 2
    assert tokens["dropped"]["exact duplicate"] == len(TEXTS[0]) + 2
    assert tokens["read"] == sum(len(text.encode()) + 2 for text in texts)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "array_record"])
def test_bad_utf8_in_lines(kind, tmp_path):
    lines = [*as_lines({"text": text} for text in TEXTS).splitlines(), b'{"text": "\xff\xfe"}']
    file = tmp_path / f"x.{kind}"
    if kind == "array_record":
        write_arrayrecord(file, lines)
    else:
        data = b"\n".join(lines)
        file.write_bytes(data if kind == "jsonl" else pack_zst(data))
    ledger = Ledger()
    assert read(kind, str(file), ledger) == TEXTS
    assert ledger.dropped == {"not UTF-8": 1}


def test_bad_utf8_and_missing_values_in_parquet(tmp_path):
    column = pyarrow.array([text.encode() for text in TEXTS] + [b"\xff\xfe", None])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    ledger = Ledger()
    assert read("parquet", str(tmp_path), ledger) == TEXTS
    assert ledger.dropped == {"not UTF-8": 1, "no text in field 'text'": 1}
    numbers = pyarrow.table({"text": [1, 2, 3]})
    pyarrow.parquet.write_table(numbers, tmp_path / "y.parquet")
    one_line(lambda: read("parquet", str(tmp_path / "y.parquet")), "int64", "not text")


def test_a_dataset_of_tfds(tmp_path, run_python):
    """Written and read in a child: TFDS may load TensorFlow to write."""
    code = """
import sys, json
import numpy as np, tensorflow_datasets as tfds

class OurLines(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(4)}
    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"Document {i} of {count}.", "n": i}

from lcl.data.prepare import prepare
root, folder = sys.argv[1:]
quiet = {"log": lambda line: None}
import os
os.environ["TFDS_DATA_DIR"] = folder
tfds.core.constants.DATA_DIR = folder
stores = prepare(root=root, tfds={"a": "our_lines", "b": "our_lines:test"}, **quiet)
path = tfds.builder("our_lines").data_dir
stores += prepare(root=root, arrayrecord={"c": path, "d": path + ":test"}, **quiet)
out = {f"{s.domain}/{s.split}": s.num_documents for s in stores}
errors = []
for options in ({"tfds": {"e": "our_linse"}}, {"tfds": {"e": "our_lines:dev"}},
                {"arrayrecord": {"e": path}, "text_field": "body"},
                {"arrayrecord": {"e": path}, "text_field": "n"}):
    try:
        prepare(root=root, **options, **quiet)
    except ValueError as error:
        errors.append(str(error))
same = [s.fingerprint for s in stores if s.domain in "ac"]
print(json.dumps([out, errors, "tensorflow" in sys.modules]))
"""
    output = run_python(code, str(tmp_path / "r"), str(tmp_path / "tfds"))
    counts, errors, _ = json.loads(output.splitlines()[-1])
    for pair, total in (("a", 30), ("b", 4), ("c", 30), ("d", 4)):
        assert counts[f"{pair}/train"] + counts[f"{pair}/heldout"] == total
    assert len(errors) == 4 and not any("\n" in error for error in errors)
    words = ["our_linse", "it has train, test", "'body'", "not text"]
    assert all(word in error for word, error in zip(words, errors, strict=True)), errors


GIANT = r"""
import pathlib, re, sys
from lcl.data.prepare import prepare
kind, path, root, most = sys.argv[1:]
stores = prepare(root=root, log=lambda line: None, **{kind: {"mine": path}})
print(sum(store.num_tokens for store in stores), stores[0].meta["ledger"]["tokens"]["read"])
# Of this program alone: ru_maxrss would count what its parent, the whole suite, held at the fork.
status = pathlib.Path("/proc/self/status")
if status.exists():
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    assert peak < int(most), f"{peak / 1e3:.0f} MB"
"""


def test_a_document_of_200_megabytes_needs_a_few_times_its_size_and_no_more(tmp_path):
    line = b"A line of the giant, one of many that are all alike.\n"
    block, count = line.replace(b"\n", b"\\n") * 20_000, 190
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(count):
            file.write(block)
        file.write(b'"}\n{"text": "A short one."}\n')
    expected = count * 20_000 * len(line) + 12 + 4
    assert expected > 200_000_000 > building.GIANT_BYTES
    done = subprocess.run(
        # Its line, its text, its UTF-8, and a little more; as int32 tokens alone it were 800 MB.
        [sys.executable, "-c", GIANT, "jsonl", *map(str, (tmp_path / "x.jsonl", tmp_path / "r"))]
        + ["1000000"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(expected)] * 2


def one_line(call, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
