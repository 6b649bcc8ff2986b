"""lcl.data.positions: positions jump as the papers say, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.attention import Mask
from lcl.data.batch import Batch, segment_runs
from lcl.data.positions import EndPrompt, PoSE, RandomPositions, hash_below, hash_words
from lcl.models import Decoder, DecoderConfig, init_params

LENGTH = 24
CALL = dict(step=3, num_steps=10, key=2**64 - 3)


def batch_of(documents, length=LENGTH, seed=0) -> Batch:
    """Rows of documents with the given numbers of transitions; random tokens, then padding."""
    rng = np.random.default_rng(seed)
    zeros = np.zeros((5, len(documents), length), np.int32)
    batch = Batch(zeros[0], zeros[1], zeros[2], zeros[3], np.float32(zeros[4]), zeros[4].copy())
    for row, lengths in enumerate(documents):
        begin = 0
        for number, n in enumerate(lengths, start=1):
            text = rng.integers(1, 50, n + 1)
            cells = slice(begin, begin + n)
            batch.tokens[row, cells], batch.targets[row, cells] = text[:-1], text[1:]
            batch.segment_ids[row, cells] = number
            batch.positions[row, cells] = np.arange(n)
            batch.loss_weights[row, cells] = 1
            batch.source_ids[row, cells] = row
            begin += n
    return batch


@st.composite
def document_rows(draw, length=LENGTH):
    """Rows of document lengths that fit."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths, left = [], length
        while left and draw(st.booleans()):
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        rows.append(lengths)
    return rows


TRANSFORMS = (
    PoSE(100),
    PoSE(100, num_chunks=4),
    PoSE(LENGTH),
    RandomPositions(100),
    RandomPositions(LENGTH),
    EndPrompt(100, 5),
    EndPrompt(100, 5, position="random"),
)


def assert_only_changed(batch, before, after, names):
    for name, kept, now, original in zip(Batch._fields, before, after, batch, strict=True):
        np.testing.assert_array_equal(original, kept)  # the input is untouched
        if name not in names:
            np.testing.assert_array_equal(now, kept)
        if kept is not None:
            assert now.dtype == kept.dtype and now.shape == kept.shape


@given(documents=document_rows(), transform=st.sampled_from(TRANSFORMS))
def test_positions_rise_within_every_segment_and_stay_below_the_target(documents, transform):
    batch = batch_of(documents)
    before = jax.tree.map(np.copy, batch)
    after = transform(batch, places_B=np.arange(len(documents)) + 70, **CALL)
    assert_only_changed(batch, before, after, {"positions"})
    assert (after.positions[batch.segment_ids == 0] == 0).all()
    for row, start, length, _ in zip(*segment_runs(batch.segment_ids), strict=True):
        positions = after.positions[row, start : start + length]
        assert (np.diff(positions) >= 1).all()
        assert positions[0] >= 0 and positions[-1] < transform.target_length
        if isinstance(transform, PoSE):
            assert positions[0] == 0
            assert (np.diff(positions) > 1).sum() <= transform.num_chunks - 1


@given(documents=document_rows(), transform=st.sampled_from(TRANSFORMS), data=st.data())
def test_any_host_gets_the_same_rows(documents, transform, data):
    places = np.arange(len(documents)) + 1000
    whole = transform(batch_of(documents), places_B=places, **CALL)
    chosen = np.array(data.draw(st.permutations(range(len(documents)))), int)[:2]
    part = jax.tree.map(lambda x: x[chosen], batch_of(documents))
    part = transform(part, places_B=places[chosen], **CALL)
    for one, other in zip(part, whole, strict=True):
        assert one is None or (one == other[chosen]).all()


@pytest.mark.parametrize("transform", TRANSFORMS[:2] + TRANSFORMS[3:4] + TRANSFORMS[6:])
def test_rows_segments_and_keys_differ(transform):
    batch = batch_of([[12, 12]] * 40)

    def drawn(key, first):
        call = dict(CALL, key=key, places_B=np.arange(40) + first)
        return transform(batch, **call).positions

    a = drawn(1, 0)
    assert len(np.unique(a, axis=0)) > 20
    assert (a != drawn(2, 0)).any() and (a != drawn(1, 40)).any()
    assert (a == drawn(1, 0)).all()
    if not isinstance(transform, EndPrompt):
        assert (a[:, :12] != a[:, 12:]).any()


def uniform(counts, low=0.5, high=1.6):
    """Whether frequencies look like draws from a uniform distribution, coarsely."""
    return (
        len(counts) and counts.min() > low * counts.mean() and counts.max() < high * counts.mean()
    )


def test_pose_draws_what_the_released_code_draws():
    """rt1 ~ U{1..(len+1)//2}; the second chunk's offset ~ U{0..Lt-len}; independent."""
    batch = batch_of([[9]] * 4000, length=9)
    positions = PoSE(30)(batch, **CALL, places_B=np.arange(4000)).positions
    jump = positions[:, -1] - 8
    cut = np.argmax(positions != np.arange(9), axis=1)[jump > 0]
    assert sorted(set(cut)) == [1, 2, 3, 4, 5]
    assert sorted(set(jump)) == list(range(22))
    assert uniform(np.bincount(cut)[1:], 0.85, 1.15) and uniform(np.bincount(jump), 0.75, 1.25)
    for c in range(1, 6):
        assert abs(jump[jump > 0][cut == c].mean() - 11) < 0.8
    even = PoSE(300)(batch_of([[8]] * 200, length=8), **CALL, places_B=np.arange(200)).positions
    assert set(np.argmax(np.diff(even, axis=1) > 1, axis=1) + 1) == {1, 2, 3, 4}
    # A position jumps once, and the text behind the cut runs on.
    assert (positions[np.arange(4000), -1] - positions[:, -4] == 3).all()


def test_pose_with_more_chunks_cuts_anywhere_and_never_goes_back():
    batch = batch_of([[9]] * 4000, length=9)
    positions = PoSE(300, num_chunks=3)(batch, **CALL, places_B=np.arange(4000)).positions
    gaps = np.diff(positions, axis=1)
    assert ((gaps > 1).sum(axis=1) <= 2).all()
    assert uniform((gaps > 1).sum(axis=0), 0.85, 1.15)  # each of the 8 places alike
    first, last = np.argmax(gaps > 1, axis=1), gaps.shape[1] - np.argmax(gaps[:, ::-1] > 1, axis=1)
    two = (gaps > 1).sum(axis=1) == 2
    rows = np.arange(4000)
    u_1 = gaps[rows, first][two] - 1
    u_2 = u_1 + gaps[rows, last - 1][two] - 1
    assert abs(u_1.mean() - 291 / 2) < 5  # u_1 ~ U{0..291}
    assert abs(u_2.mean() - 291 * 3 / 4) < 5  # u_2 ~ U{u_1..291}


def test_pose_leaves_segments_of_one_cell_and_chunks_short_ones():
    batch = batch_of([[1, 2, 3]])
    call = dict(CALL, places_B=np.array([5]))
    for chunks in (2, 3, 7):
        positions = PoSE(1000, num_chunks=chunks)(batch, **call).positions[0]
        assert positions[0] == positions[1] == positions[3] == 0
        assert positions[2] > 1 and positions[5] > 2  # true of all but one key in a few hundred


def test_random_positions_are_uniform_subsets():
    batch = batch_of([[4]] * 6000, length=4)
    positions = RandomPositions(8)(batch, **CALL, places_B=np.arange(6000)).positions
    subsets, counts = np.unique(positions, axis=0, return_counts=True)
    assert len(subsets) == 70  # 8 choose 4
    assert uniform(counts, 0.6, 1.5)
    assert (RandomPositions(4)(batch, **CALL, places_B=np.arange(6000)).positions == range(4)).all()


def test_endprompt_is_the_docstrings_picture():
    batch = batch_of([[4]], length=8)
    batch.tokens[0, :4], batch.targets[0, :4] = [1, 2, 3, 4], [2, 3, 4, 5]
    before = jax.tree.map(np.copy, batch)
    prompt = EndPrompt(32, (10, 11, 12), prompt_weight=0.5)
    assert prompt.content_length(8) == 5
    after = prompt(batch, **CALL, places_B=np.array([0]))
    assert_only_changed(batch, before, after, set(Batch._fields) - {"row_index"})
    assert after.tokens[0].tolist() == [1, 2, 3, 4, 5, 10, 11, 0]
    assert after.targets[0].tolist() == [2, 3, 4, 5, 10, 11, 12, 0]
    assert after.positions[0].tolist() == [0, 1, 2, 3, 4, 29, 30, 0]
    assert after.segment_ids[0].tolist() == [1] * 7 + [0]
    assert after.loss_weights[0].tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0]


@given(documents=document_rows(LENGTH - 5), position=st.sampled_from(["fixed", "random"]))
def test_endprompt_keeps_the_text_and_ends_every_row(documents, position):
    batch = batch_of(documents)
    prompt = EndPrompt(100, [90, 91, 92, 93, 94], position=position)
    assert prompt.content_length(LENGTH) == LENGTH - 5
    after = prompt(batch, **CALL, places_B=np.arange(len(documents)))
    for row, lengths in enumerate(documents):
        end = sum(lengths)
        for name in Batch._fields[:-1]:
            now, then = getattr(after, name)[row], getattr(batch, name)[row]
            assert (now[:end] == then[:end]).all()
            assert (now[end + (5 if lengths else 0) :] == 0).all()
        if not lengths:
            continue
        added = slice(end, end + 5)
        assert after.tokens[row, added].tolist() == [batch.targets[row, end - 1], 90, 91, 92, 93]
        assert after.targets[row, added].tolist() == [90, 91, 92, 93, 94]
        assert (after.segment_ids[row, added] == len(lengths)).all()
        assert (after.source_ids[row, added] == row).all()
        positions = after.positions[row, added]
        assert positions[0] == lengths[-1]  # the text's last token, where it would be
        assert (np.diff(positions[1:]) == 1).all()
        assert lengths[-1] < positions[1] <= 95
        if position == "fixed":
            assert positions[1] == 95  # so that the last prompt token stands at 99


def test_random_ends_are_uniform_behind_the_text():
    batch = batch_of([[6]] * 3000, length=8)
    prompt = EndPrompt(20, (90, 91), position="random")
    start = prompt(batch, **CALL, places_B=np.arange(3000)).positions[:, 7]
    assert sorted(set(start)) == list(range(7, 19))  # text has 7 tokens; 18, 19 are the last two
    assert uniform(np.bincount(start)[7:], 0.8, 1.2)


def test_moving_the_rows_own_end_is_the_released_random_variant():
    batch = batch_of([[10, 14], [24], [20, 3], [3]])
    call = dict(CALL, places_B=np.arange(4))
    fixed = EndPrompt(100, 4)(batch, **call).positions
    assert fixed[0, 10:].tolist() == [*range(10), 96, 97, 98, 99]
    assert fixed[1].tolist() == [*range(20), 96, 97, 98, 99]
    assert (fixed[2:] == batch.positions[2:]).all()  # 3 are not longer than 4: contiguous
    assert (fixed[0, :10] == range(10)).all()
    many = batch_of([[24]] * 3000)
    random = EndPrompt(30, 4, position="random")(many, **CALL, places_B=np.arange(3000)).positions
    assert sorted(set(random[:, 20])) == list(range(20, 27))  # [i_len, logical_max - m]
    assert uniform(np.bincount(random[:, 20])[20:], 0.8, 1.2)
    assert EndPrompt(100, 4).content_length(24) == 24


def test_a_prompt_may_be_text():
    prompt = EndPrompt(64, "End.", tokenizer="byte")
    assert prompt.prompt_tokens == tuple(b"End.") and prompt.num_prompt_tokens == 4
    assert prompt.settings() == EndPrompt(64, list(b"End.")).settings()
    assert prompt.settings() != EndPrompt(64, "End!").settings()
    assert hash(prompt) == hash(EndPrompt(64, "End."))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoSE(64, num_chunks=1), "num_chunks is 1"),
        (lambda: PoSE(1), "target_length is 1"),
        (lambda: RandomPositions(0), "target_length is 0"),
        (lambda: PoSE(64).content_length(65), "target_length 64 is shorter than the rows of 65"),
        (lambda: RandomPositions(64).content_length(65), "target_length 64 is shorter"),
        (lambda: EndPrompt(64, (1, 2)).content_length(65), "target_length 64 is shorter"),
        (lambda: EndPrompt(64, ""), "prompt is ''"),
        (lambda: EndPrompt(64, 0), "prompt is 0"),
        (lambda: EndPrompt(64, (3, -1)), "prompt has token -1"),
        (lambda: EndPrompt(3, (1, 2, 3)), "target_length is 3; give more than the prompt's 3"),
        (lambda: EndPrompt(64, (1,), position="end"), "position 'end' is unknown"),
        (lambda: EndPrompt(64, (1,), prompt_weight=-1.0), "prompt_weight is -1.0"),
        (lambda: EndPrompt(64, (1, 2, 3)).content_length(3), "rows of 3 have no room for text"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_hashes_are_frozen_and_even():
    """A change here would change the batches of every run that uses them."""
    assert hash_words(0, np.arange(2), 3).tolist() == [
        17996121457536601210,
        7521888212171461645,
    ]
    draws = hash_below(10, 5, np.arange(20_000))
    assert uniform(np.bincount(draws, minlength=10), 0.92, 1.08)
    assert uniform(np.bincount(draws[1:] * 10 + draws[:-1], minlength=100), 0.7, 1.3)


CONFIG = DecoderConfig(
    vocab_size=100, num_layers=1, embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1
)


@functools.lru_cache
def params():
    return jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))


@functools.partial(jax.jit, static_argnames="attention")
def decode(params, batch: Batch, attention: str):
    model = Decoder(dataclasses.replace(CONFIG, attention=attention))
    return model.apply(
        {"params": params}, batch.tokens, batch.positions, segment_ids_BT=batch.segment_ids
    )


def logits(batch: Batch, attention: str) -> np.ndarray:
    return np.asarray(decode(params(), jax.tree.map(jnp.asarray, batch), attention))


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
@pytest.mark.parametrize(
    "transform", [PoSE(4000), RandomPositions(4000), EndPrompt(4000, (90, 91, 92))]
)
def test_a_decoder_sees_what_the_mask_says_wherever_positions_jump(transform, attention):
    """One layer, one token changed: what moves is the column of the dense mask, nothing else."""
    documents = [[130, 30, 1], [150], [90, 60]]
    batch = transform(batch_of(documents, length=170), **CALL, places_B=np.arange(3))
    assert batch.positions.max() > 2000
    plain = logits(batch, attention)
    seen = Mask().dense(np.arange(170), batch.segment_ids)
    for cell in (0, 100, 129, 131, 149):
        tokens = batch.tokens.copy()
        tokens[:, cell] = (tokens[:, cell] + 1) % 100
        changed = batch._replace(tokens=tokens)
        moved = logits(changed, attention) != plain
        np.testing.assert_array_equal(moved.any(axis=-1), seen[:, :, cell])


def test_positions_are_what_the_decoder_rotates_by():
    """Blockwise equals reference under jumps, and a jump is seen."""
    batch = batch_of([[130, 30, 1], [150]], length=170)
    moved = PoSE(4000)(batch, **CALL, places_B=np.arange(2))
    one, other, still = (
        logits(b, attention)
        for b, attention in ((moved, "blockwise"), (moved, "reference"), (batch, "blockwise"))
    )
    real = batch.segment_ids > 0
    np.testing.assert_allclose(one[real], other[real], atol=2e-5)
    assert np.abs(one - still)[real].max() > 1e-2
