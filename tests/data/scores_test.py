"""lcl.data.scores: numbers beside a store, and streams that read what they choose."""

from __future__ import annotations

import collections
import doctest
import pathlib

import numpy as np
import pytest

import lcl.data.scores
from lcl.data.mixture import Mixture
from lcl.data.mixture_subset import Subset
from lcl.data.scores import read_scores, scores_of, scores_path, write_scores
from lcl.data.stage_data import StageData
from lcl.data.store import Data, StoreError
from lcl.data.stream import build_stream
from lcl.data.testing import make_stores

T, BATCH = 32, 6


@pytest.fixture
def data(tmp_path):
    return make_stores(tmp_path, {"a": 60, "b": 20}, seed=0)


def noise(store, seed=0):
    return np.random.default_rng(seed).random(store.num_documents)


def stream_of(data, part, steps, **kwargs):
    return build_stream(data, [("x", StageData(part, T, BATCH), steps)], seed=0, **kwargs)


def times_seen(stream, store):
    """How often the stream's rows show each transition of a store: one array a document."""
    places = {int(name): i for i, name in enumerate(store.document_ids)}
    seen = [np.zeros(max(0, n - 1), int) for n in store.lengths.tolist()]
    for t in range(stream.num_steps):
        for row in stream.rows(t):
            for document, start, length in row.slices:
                seen[places[document]][start : start + length] += 1
    return seen


def test_what_was_written_is_read(data):
    store = data.open("a")
    path = write_scores(store, "reference", noise(store), {"step": 7})
    found = read_scores(store, "reference")
    assert found.values.dtype == np.float32 and found.about["step"] == 7
    np.testing.assert_array_equal(found.values, noise(store).astype(np.float32))
    assert pathlib.Path(path).parent.name == "scores" and data.domains() == ["a", "b"]
    assert scores_of(store) == ["reference"] and scores_of(data.open("b")) == []
    assert [p.name for p in pathlib.Path(path).parent.iterdir()] == ["train-reference.npz"]
    # The fingerprint tells apart numbers and what made them, and nothing else.
    first = found.fingerprint
    write_scores(store, "again", noise(store), {"step": 7})
    assert read_scores(store, "again").fingerprint == first
    for values, about in ((noise(store, 1), {"step": 7}), (noise(store), {"step": 8})):
        write_scores(store, "again", values, about)
        assert read_scores(store, "again").fingerprint != first


def test_a_subset_reads_the_documents_of_lowest_score_and_no_other(data):
    store = data.open("a")
    write_scores(store, "reference", noise(store), {})
    part = Subset(Mixture({"a": 1}), "a", by="scores:reference", best="low", share=0.5, tokens=1500)
    stream = stream_of(data, part, 40)
    seen = times_seen(stream, store)
    rank = np.argsort(noise(store).astype(np.float32), kind="stable")
    lengths = store.lengths - 1
    want = rank[: np.searchsorted(np.cumsum(lengths[rank]), 1500) + 1]
    assert {i for i, one in enumerate(seen) if one.any()} == set(want.tolist())
    # Read as often as the stage's length makes it: all alike, to one.
    counts = np.concatenate([seen[i] for i in want.tolist()])
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_epochs_over_a_right_sized_subset_show_each_document_exactly_so_often(tmp_path, epochs):
    store = make_stores(tmp_path, {"a": 500}, mean_words=3).open("a")
    write_scores(store, "reference", noise(store), {})
    part = Subset(Mixture({"a": 1}), "a", epochs=epochs, by="scores:reference", best="low")
    stream = build_stream(Data(str(tmp_path)), [("x", StageData(part, 384, BATCH), 5)], seed=0)
    seen = times_seen(stream, store)
    assert (store.lengths - 1).max() <= 384  # so no document is cut in two
    for one in seen:
        assert one.tolist() in ([0] * len(one), [epochs] * len(one))
    # The part is as large as the stage's rows make it, less what padding and its last rows cost.
    chosen = [i for i, one in enumerate(seen) if one.any()]
    tokens, room = (store.lengths - 1)[chosen].sum(), 5 * BATCH * 384 / epochs
    assert 0.85 * room <= tokens <= room
    rank = np.argsort(noise(store).astype(np.float32), kind="stable").tolist()
    assert len(set(chosen) & set(rank[: len(chosen)])) >= 0.85 * len(chosen)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_part_of_so_many_tokens_is_shown_whole_where_the_stage_is_whole_epochs(data, epochs):
    """Documents longer than a row too: all of the part's rows are read, none is left out."""
    store = data.open("a")
    write_scores(store, "reference", noise(store), {})
    part = Subset(Mixture({"a": 1}), "a", tokens=1500, by="scores:reference", best="low")

    def stream(steps):
        return build_stream(data, [("x", StageData(part, T, 1), steps)], seed=0)

    rows = len({(row.row, row.slices) for t in range(200) for row in stream(200).rows(t)})
    seen = times_seen(stream(epochs * rows), store)
    for one in seen:
        assert one.tolist() in ([0] * len(one), [epochs] * len(one))
    assert sum(len(one) for one in seen if one.any()) >= 1500


def test_scores_made_anew_are_another_stream(data, tmp_path):
    store = data.open("a")
    part = Subset(Mixture({"a": 1}), "a", tokens=1000, by="scores:reference", best="low")
    write_scores(store, "reference", noise(store), {})
    first = stream_of(data, part, 4, plan_dir=tmp_path / "plans")
    rows = [first.rows(t) for t in range(4)]
    again = stream_of(data, part, 4, plan_dir=tmp_path / "plans")
    assert again.fingerprint == first.fingerprint
    write_scores(store, "reference", noise(store, 1), {})
    other = stream_of(data, part, 4, plan_dir=tmp_path / "plans")  # no stale plan from the disk
    assert other.fingerprint != first.fingerprint
    assert [other.rows(t) for t in range(4)] != rows
    assert other.scores == {"a scores:reference": read_scores(store, "reference").fingerprint}
    assert stream_of(data, Subset(Mixture({"a": 1}), "a", tokens=1000), 4).scores == {}


def test_what_is_wrong_is_said_in_a_line(data, tmp_path):
    store = data.open("a")
    write_scores(store, "reference", noise(store), {})

    def refused(message, call):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    refused("did you mean 'reference'", lambda: read_scores(store, "referense"))
    refused("has no scores 'x' .there are none", lambda: read_scores(data.open("b"), "x"))
    refused("must be letters, digits", lambda: scores_path(store, "../x"))
    refused("finite number for each of its", lambda: write_scores(store, "x", [1.0, 2.0], {}))
    holes = np.where(np.arange(store.num_documents) == 3, np.nan, 1.0)
    refused("with 1 that are not finite", lambda: write_scores(store, "x", holes, {}))
    missing = Subset(Mixture({"a": 1}), "a", tokens=10, by="scores:referense")
    refused("did you mean 'reference'", lambda: stream_of(data, missing, 2))
    path = pathlib.Path(scores_path(store, "reference"))
    path.write_bytes(path.read_bytes()[:-9])
    refused("are torn; remove the file", lambda: read_scores(store, "reference"))


def test_scores_of_a_store_that_was_prepared_anew_are_refused(data, tmp_path):
    write_scores(data.open("a"), "reference", noise(data.open("a")), {})
    scores = pathlib.Path(scores_path(data.open("a"), "reference"))
    other = make_stores(tmp_path / "other", {"a": 60}, seed=1).open("a")
    place = pathlib.Path(scores_path(other, "reference"))
    place.parent.mkdir()
    place.write_bytes(scores.read_bytes())
    with pytest.raises(StoreError, match="are of a store that was prepared before"):
        read_scores(other, "reference")


def test_rows_are_counted_as_the_test_counts_them(data):
    """The counting above is not blind: a plain epoch shows each transition once."""
    store = data.open("b")
    rows = sum(-(-int(n) // T) for n in store.lengths - 1)
    stream = stream_of(data, Mixture({"b": 1}), -(-rows // BATCH))
    counts = collections.Counter(np.concatenate(times_seen(stream, store)).tolist())
    assert min(counts) >= 1 and max(counts) <= 2


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.data.scores).failed == 0
