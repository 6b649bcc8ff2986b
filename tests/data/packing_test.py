"""lcl.data.packing: layouts hold every transition once, and best fit is best fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.packing import METHODS, Layout, TornLayoutError, pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def best_fit_decreasing(lengths, capacity):
    """The textbook O(n^2) algorithm: room left in each bin, in order of opening."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def coverage(layout, lengths):
    """How often each transition of each document is in the layout."""
    counts = [np.zeros(n, int) for n in lengths]
    for document, start, length in zip(layout.document, layout.start, layout.length, strict=True):
        assert start + length <= lengths[document]
        counts[document][start : start + length] += 1
    return counts


@given(lengths=LENGTHS, row_length=st.integers(1, 24), method=st.sampled_from(METHODS))
def test_every_transition_is_in_exactly_one_slice(lengths, row_length, method):
    layout = pack(lengths, row_length, method=method)
    assert all((c == 1).all() for c in coverage(layout, lengths))
    assert layout.num_tokens == sum(lengths)
    assert (layout.length >= 1).all()
    assert layout.row_offsets[0] == 0 and layout.row_offsets[-1] == len(layout.document)


@given(lengths=LENGTHS, row_length=st.integers(1, 24), method=st.sampled_from(METHODS))
def test_no_row_is_empty_or_too_long_and_rows_reach_the_bound(lengths, row_length, method):
    layout = pack(lengths, row_length, method=method)
    tokens = layout.tokens_in(np.arange(layout.num_rows))
    assert ((tokens >= 1) & (tokens <= row_length)).all()
    assert layout.num_rows >= -(-sum(lengths) // row_length)
    if method == "concat":
        assert layout.num_rows == -(-sum(lengths) // row_length)
        assert (tokens[:-1] == row_length).all()


@given(lengths=LENGTHS, row_length=st.integers(1, 24))
def test_best_fit_equals_the_quadratic_algorithm(lengths, row_length):
    layout = pack(lengths, row_length)
    rest = [n % row_length for n in lengths if n % row_length]
    rooms = best_fit_decreasing(rest, row_length) + [0] * sum(n // row_length for n in lengths)
    got = row_length - layout.tokens_in(np.arange(layout.num_rows))
    assert sorted(got.tolist()) == sorted(rooms)


@given(lengths=LENGTHS, row_length=st.integers(1, 24))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_length):
    layout = pack(lengths, row_length)
    assert layout.num_cut_documents == sum(n > row_length for n in lengths)
    full = layout.length == row_length
    assert (full | (layout.start + layout.length == np.array(lengths)[layout.document])).all()


@given(lengths=LENGTHS, row_length=st.integers(1, 24), data=st.data())
def test_concat_follows_the_order(lengths, row_length, data):
    order = np.array(data.draw(st.permutations(range(len(lengths)))), int)
    layout = pack(lengths, row_length, method="concat", order_N=order)
    stream = [(d, i) for d in order for i in range(lengths[d])]
    slices = zip(layout.document, layout.start, layout.length, strict=True)
    assert [(d, s + i) for d, s, n in slices for i in range(n)] == stream


@given(lengths=LENGTHS, row_length=st.integers(2, 24), data=st.data())
def test_best_fit_rows_list_their_documents_in_order(lengths, row_length, data):
    """Longest-first rows would tie a document's length to its place in the row."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))), int)
    rank = np.argsort(order)
    layout = pack(lengths, row_length, order_N=order)
    for row in range(layout.num_rows):
        documents = layout.rows([row]).document
        assert (np.diff(rank[documents]) > 0).all()


def test_fill_at_the_lognormal_of_real_documents():
    """The measurement of record: lognormal(5.8, 1.1) clipped to 16..2048, 20k documents, L 2048."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.8, 1.1, 20_000), 16, 2048).astype(int)
    layout = pack(lengths, 2048)
    assert layout.fill >= 0.999
    assert layout.num_rows <= -(-lengths.sum() // 2048) + 1


def test_steps_are_shared_by_equal_documents():
    """A million equal documents are one step of the algorithm, not a million."""
    layout = pack(np.full(1_000_000, 3), 10)
    assert layout.num_rows == 333_334
    assert layout.num_tokens == 3_000_000


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), data=st.data())
def test_rows_returns_the_slices_row_after_row(lengths, data):
    layout = pack(lengths, 8)
    asked = data.draw(st.lists(st.integers(0, layout.num_rows - 1), max_size=8))
    slices = layout.rows(asked)
    want = [
        (i, *(int(a[s]) for a in (layout.document, layout.start, layout.length)))
        for i, r in enumerate(asked)
        for s in range(layout.row_offsets[r], layout.row_offsets[r + 1])
    ]
    assert [tuple(map(int, one)) for one in zip(*slices, strict=True)] == want


def test_it_draws_itself():
    text = str(pack([11, 5, 3, 2], 8, method="concat"))
    assert text.splitlines() == [
        "Layout of 3 rows x 8: 5 slices of 4 documents (1 cut), fill 0.875",
        "  row 0 |AAAAAAAA|",
        "  row 1 |AAABBBBB|",
        "  row 2 |CCCDD...|",
    ]
    large = str(pack(np.full(100, 70), 1000))
    assert large.count("\n") <= 13 and max(map(len, large.splitlines())) < 80
    assert "fill 0" in str(pack([], 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(row_length=0), "row_length is 0; give at least 1"),
        (
            dict(row_length=8, method="best"),
            "packing 'best' is unknown; use one of best_fit, concat",
        ),
        (dict(row_length=8, order_N=np.arange(2)), "order_N has 2 entries for 3 documents"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pack([3, 4, 5], **arguments)
    assert "\n" not in str(error.value)


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match="a document has length -1; lengths count transitions"):
        pack([3, -1], 8)


def test_save_and_load(tmp_path):
    layout = pack([11, 5, 3, 2], 8)
    layout.save(tmp_path / "deep" / "plan")
    loaded = Layout.load(tmp_path / "deep" / "plan")
    assert loaded.fingerprint == layout.fingerprint
    assert str(loaded) == str(layout)
    assert os.listdir(tmp_path / "deep") == ["plan"]  # nothing temporary stays
    base = loaded.document
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    layout.save(tmp_path / "deep" / "plan")  # again: kept, no error
    with pytest.raises(FileNotFoundError):
        Layout.load(tmp_path / "none")


@pytest.mark.parametrize("harm", ["no meta", "cut", "bit", "half meta", "missing array"])
def test_a_torn_layout_is_recognised(tmp_path, harm):
    path = tmp_path / "plan"
    pack([11, 5, 3, 2], 8).save(path)
    if harm == "no meta":
        (path / "meta.json").unlink()
    elif harm == "half meta":
        (path / "meta.json").write_text(json.dumps({"row_length": 8})[:-3])
    elif harm == "missing array":
        (path / "start.npy").unlink()
    else:
        data = bytearray((path / "document.npy").read_bytes())
        if harm == "cut":
            del data[-8:]
        else:
            data[-8] ^= 1
        (path / "document.npy").write_bytes(bytes(data))
    with pytest.raises(TornLayoutError, match="plan .*; delete it"):
        Layout.load(path)


def test_processes_may_save_the_same_layout_at_once(tmp_path):
    code = """
import sys, numpy as np
from lcl.data.packing import pack
layout = pack(np.arange(1, 2000), 64)
print("ready", flush=True)
sys.stdin.readline()
layout.save(sys.argv[1])
"""
    path = tmp_path / "plan"
    command = [sys.executable, "-c", code, str(path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=60)
        assert worker.returncode == 0
    assert Layout.load(path).num_tokens == sum(range(1, 2000))
    assert os.listdir(tmp_path) == ["plan"]


def test_oracle_of_the_oracle():
    assert best_fit_decreasing([5, 4, 3, 2], 8) == [0, 2]
