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

from lcl.data.packing import METHODS, Layout, TornLayoutError, _best_fit_bins, pack

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


def first_fit(items, capacity):
    """The textbook O(n^2) algorithm: the bin of each item."""
    rooms, bins = [], []
    for item in items:
        chosen = next((b for b, room in enumerate(rooms) if room >= item), len(rooms))
        rooms += [capacity] * (chosen == len(rooms))
        rooms[chosen] -= item
        bins.append(chosen)
    return bins


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


@given(items=st.lists(st.integers(1, 24), max_size=60), more_room=st.integers(0, 10))
def test_every_assignment_is_a_best_fit(items, more_room):
    """The rule itself, item by item: the fullest bin with room, a new one only if there is none."""
    capacity = max(items, default=1) + more_room
    values = sorted(set(items), reverse=True)
    bins, num_bins = _best_fit_bins(values, [items.count(v) for v in values], capacity)
    rooms = {}
    for item, chosen in zip(sorted(items, reverse=True), bins, strict=True):
        fitting = [room for room in rooms.values() if room >= item]
        assert rooms.get(chosen, capacity) == min(fitting, default=capacity)
        assert not fitting or chosen in rooms
        rooms[chosen] = rooms.get(chosen, capacity) - item
    assert sorted(rooms) == list(range(num_bins))


@given(lengths=LENGTHS, row_length=st.integers(1, 24), data=st.data())
def test_first_fit_equals_the_quadratic_algorithm(lengths, row_length, data):
    """Row by row, slice by slice: no freedom is left."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))), int)
    layout = pack(lengths, row_length, method="first_fit", order_N=order)
    pieces = [d for d in order.tolist() if lengths[d] % row_length]
    bins = first_fit([lengths[d] % row_length for d in pieces], row_length)
    want = [[d for d, b in zip(pieces, bins, strict=True) if b == row] for row in set(bins)]
    want += [[d] for d in order.tolist() for _ in range(lengths[d] // row_length)]
    got = [layout.rows([row]).document.tolist() for row in range(layout.num_rows)]
    assert got == want


def test_first_fit_equals_the_quadratic_algorithm_at_size():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.8, 1.1, 3000), 16, 2047).astype(int)
    layout = pack(lengths, 2048, method="first_fit")
    row = np.repeat(np.arange(layout.num_rows), np.diff(layout.row_offsets))
    got = np.empty(len(lengths), int)
    got[layout.document] = row
    assert got.tolist() == first_fit(lengths.tolist(), 2048)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    row_length=st.integers(1, 24),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_an_order_may_repeat_and_omit_documents(lengths, row_length, method, data):
    """Each occurrence is a document of its own: as if it were copied under another number."""
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=40))
    layout = pack(lengths, row_length, method=method, order_N=order)
    copies = pack([lengths[d] for d in order], row_length, method=method)
    assert layout.document.tolist() == [order[i] for i in copies.document]
    for name in ("row_offsets", "start", "length"):
        assert getattr(layout, name).tolist() == getattr(copies, name).tolist()
    for document, counts in enumerate(coverage(layout, lengths)):
        assert (counts == order.count(document)).all()


@given(lengths=LENGTHS, row_length=st.integers(1, 24), method=st.sampled_from(METHODS))
def test_padding_and_cuts_are_counted(lengths, row_length, method):
    layout = pack(lengths, row_length, method=method)
    drawn = "".join(str(layout).split("|")[1::2]) if layout.num_rows <= 12 else None
    if drawn is not None and row_length <= 64:
        assert layout.num_padding == drawn.count(".")
    assert layout.num_cuts == len(layout.document) - sum(n > 0 for n in lengths)


@given(
    lengths=LENGTHS,
    row_length=st.integers(1, 24),
    method=st.sampled_from(["best_fit", "first_fit"]),
)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_length, method):
    layout = pack(lengths, row_length, method=method)
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


@given(
    lengths=LENGTHS,
    row_length=st.integers(2, 24),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_rows_list_their_documents_in_order(lengths, row_length, method, data):
    """Longest-first rows would tie a document's length to its place in the row."""
    order = np.array(data.draw(st.permutations(range(len(lengths)))), int)
    rank = np.argsort(order)
    layout = pack(lengths, row_length, method=method, order_N=order)
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
    # First fit in the given order is worse, and not by much.
    assert 0.99 < pack(lengths, 2048, method="first_fit").fill < layout.fill


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
            "packing 'best' is unknown; use one of best_fit, first_fit, concat",
        ),
        (dict(row_length=8, order_N=[0, 3]), "order_N names document 3; there are 3, from 0 on"),
        (dict(row_length=8, order_N=[-1, 2]), "order_N names document -1; there are 3, from 0 on"),
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
    assert first_fit([3, 5, 3, 2], 8) == [0, 0, 1, 1]
