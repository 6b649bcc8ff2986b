"""Positions that run ahead of the text: PoSE, random positions and EndPrompt.

A model learns positions it has never seen by rows that are short but *say* they are long. Three
notions stay apart: the *cell* of a token in its row (causality compares it), its *segment* (which
document; attention stays inside), its *position* (what RoPE rotates by). These transforms change
positions only; EndPrompt also adds cells, at the end of the row.

    one segment of 8 cells, target_length 32

    as it is       0  1  2  3  4  5  6  7
    PoSE           0  1  2 |14 15 16 17 18     a chunk at 0, the rest at a random offset
    RandomPositions 1  4  9 10 17 22 25 30     a sorted sample of all 32
    EndPrompt      0  1  2  3  4 |29 30 31     5 cells of text, then a prompt at the very end

Random numbers are hashes of the stage's key, the row's number in the stage and the segment's number
in the row: nothing is drawn, so any host gets the same for any part of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from lcl.data.batch import Batch, Runs, segment_runs
from lcl.data.ordering import GOLDEN, mix, permute


def hash_words(key: int, *counters: Any) -> np.ndarray:
    """Hash counters under a key, elementwise: a random number with a name.

    Args:
        key: int; the low 64 bits count.
        counters: int arrays that broadcast against each other.

    Returns:
        uint64 array of the broadcast shape. One round of splitmix64 a counter.

    Example:
        >>> bool((hash_words(7, np.arange(3), 0) == hash_words(7, np.arange(3), 1)).any())
        False
    """
    arrays = np.broadcast_arrays(*[np.atleast_1d(np.asarray(c, np.int64)) for c in counters])
    words = np.full(arrays[0].shape, key & (2**64 - 1), np.uint64)
    for counter in arrays:
        words = mix((words + GOLDEN) ^ counter.astype(np.uint64))
    return words


def hash_below(bound: Any, key: int, *counters: Any) -> np.ndarray:
    """Hash counters to integers in [0, bound), bound in [1, 2**31]; int64."""
    high = hash_words(key, *counters) >> np.uint64(32)
    # Multiply and shift: the bias is below bound / 2**32.
    return ((high * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)


def _check_target(target_length: int, row_length: int) -> None:
    if row_length > target_length:
        raise ValueError(
            f"target_length {target_length} is shorter than the rows of {row_length}; positions "
            "are to reach beyond the row"
        )


def _scatter(positions_BT: np.ndarray, runs: Runs, values: np.ndarray) -> np.ndarray:
    """Copy positions with the cells of all runs set to `values`, run after run."""
    out = np.array(positions_BT)
    first = np.cumsum(runs.length) - runs.length
    begin = runs.row * positions_BT.shape[1] + runs.start
    cells = np.arange(len(values)) + np.repeat(begin - first, runs.length)
    out.ravel()[cells] = values
    return out


@dataclasses.dataclass(frozen=True)
class PoSE:
    """Positional skip-wise training: each segment in chunks, each chunk at a random offset.

    A segment of l cells is cut into N chunks; chunk i is moved by u_i with u_0 = 0 and, in turn,
    u_i ~ U{u_(i-1) .. target_length - l}: positions rise, and the largest is below target_length.
    With two chunks the first has c ~ U{1 .. floor((l + 1) / 2)} cells, as in the released code;
    more chunks are cut at distinct places, uniformly.

        l = 8, N = 2, target_length 32     c = 3, u_1 = 11      0 1 2 | 14 15 16 17 18
        gaps between cells seen            1 .. 7 within, 12 .. 18 across

    The content is left together: chunk 2 goes on where chunk 1 stopped. The paper (Zhu et al. 2023,
    arXiv:2309.10400) allows that; its released code (train_pose.py) instead takes chunk 2 from a
    random later place of a document cut at 5 rows, so text is skipped. Rows here are whole already.

    Attributes:
        target_length: L_t, positions are below it; at least the row's length.
        num_chunks: N >= 2; segments with fewer cells have a chunk a cell.

    Example:
        >>> from lcl.data.batch import Batch
        >>> zeros = np.zeros((1, 8), np.int32)
        >>> batch = Batch(zeros, zeros, zeros + 1, np.arange(8, dtype=np.int32)[None], zeros, zeros)
        >>> moved = PoSE(32)(batch, step=0, num_steps=1, key=1, places_B=np.array([0])).positions[0]
        >>> bool((np.diff(moved) >= 1).all()), int(moved[0]), int(moved[-1]) < 32
        (True, 0, True)
    """

    target_length: int
    num_chunks: int = 2

    def __post_init__(self) -> None:
        if self.num_chunks < 2:
            raise ValueError(f"num_chunks is {self.num_chunks}; give at least 2")
        if not 2 <= self.target_length <= 2**31:
            raise ValueError(f"target_length is {self.target_length}; give 2 to 2**31")

    def content_length(self, row_length: int) -> int:
        """All cells hold documents; refuses rows longer than the target."""
        _check_target(self.target_length, row_length)
        return row_length

    def _cuts(self, runs: Runs, key_S: np.ndarray) -> np.ndarray:
        """First cells of chunks 1 .. N - 1 of every segment, int64[N - 1, S], rising."""
        if self.num_chunks == 2:
            return 1 + hash_below((runs.length + 1) // 2, 0, key_S.view(np.int64))[None]
        # The first entries of a permutation are a sample without replacement; short segments have
        # no more places than l - 1, the chunks left over are empty.
        places = np.maximum(runs.length - 1, 1)
        index = np.arange(self.num_chunks - 1)[:, None]
        drawn = 1 + permute(np.minimum(index, places - 1), places, key_S)
        return np.sort(np.where(index < runs.length - 1, drawn, runs.length), axis=0)

    def __call__(
        self, batch: Batch, *, step: int, num_steps: int, key: int, places_B: np.ndarray
    ) -> Batch:
        """Move the positions of every segment (see `lcl.data.batch.RowTransform`)."""
        runs = segment_runs(batch.segment_ids)
        place = np.asarray(places_B, np.int64)[runs.row]
        cuts = self._cuts(runs, hash_words(key, place, runs.segment, 0))
        first = np.cumsum(runs.length) - runs.length
        cell = np.arange(int(runs.length.sum())) - np.repeat(first, runs.length)
        moved = cell.copy()
        most, offset = self.target_length - runs.length, np.zeros_like(runs.length)
        for i, cut in enumerate(cuts, start=1):
            jump = hash_below(most - offset + 1, key, place, runs.segment, i)
            moved += np.where(cell >= np.repeat(cut, runs.length), np.repeat(jump, runs.length), 0)
            offset = offset + jump
        return batch._replace(positions=_scatter(batch.positions, runs, moved))

    def settings(self) -> dict[str, Any]:
        """Return the fields, as plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class RandomPositions:
    """Randomised positions: each segment's are a sorted sample of all below target_length.

    Uniform over the subsets of that size, without replacement (Ruoss et al. 2023, arXiv:2305.16843;
    the RandPos baseline of PoSE).

    Attributes:
        target_length: positions are below it; at least the row's length.
    """

    target_length: int

    def __post_init__(self) -> None:
        if not 2 <= self.target_length <= 2**31:
            raise ValueError(f"target_length is {self.target_length}; give 2 to 2**31")

    def content_length(self, row_length: int) -> int:
        """All cells hold documents; refuses rows longer than the target."""
        _check_target(self.target_length, row_length)
        return row_length

    def __call__(
        self, batch: Batch, *, step: int, num_steps: int, key: int, places_B: np.ndarray
    ) -> Batch:
        """Draw the positions of every segment (see `lcl.data.batch.RowTransform`)."""
        runs = segment_runs(batch.segment_ids)
        place = np.asarray(places_B, np.int64)[runs.row]
        keys = hash_words(key, place, runs.segment, 0)
        first = np.cumsum(runs.length) - runs.length
        cell = np.arange(int(runs.length.sum())) - np.repeat(first, runs.length)
        # The first l entries of a keyed permutation of all positions: distinct and uniform.
        drawn = permute(cell, self.target_length, np.repeat(keys, runs.length))
        order = np.lexsort((drawn, np.repeat(np.arange(len(runs.row)), runs.length)))
        return batch._replace(positions=_scatter(batch.positions, runs, drawn[order]))

    def settings(self) -> dict[str, Any]:
        """Return the fields, as plain values."""
        return dataclasses.asdict(self)


@functools.lru_cache(maxsize=32)
def _tokens(text: str, spec: str) -> tuple[int, ...]:
    from lcl.data.tokenizers import load_tokenizer

    return tuple(load_tokenizer(spec).encode(text).tolist())


@dataclasses.dataclass(frozen=True)
class EndPrompt:
    """Short text, then a prompt of m tokens at the far end of the target context.

    The row's text keeps its positions 0, 1, ...; the prompt stands at the last m positions of the
    target ("fixed"), or at m positions in a row from a random one behind the text on ("random").
    Text and prompt are one segment: the prompt attends to the text across the gap, and that is all
    the long distance there is. Distances seen: those of the text, and about target_length - l to
    target_length; none between.

        text a b c d e (4 transitions a>b .. d>e), prompt x y z (m = 3), target_length 32

        tokens      a  b  c  d | e  x  y  .     m cells more: e > x, x > y, y > z
        targets     b  c  d  e | x  y  z  .     every token of text and prompt is a label
        positions   0  1  2  3 | 4 29 30  .     x y z stand at 29 30 31; z is never an input
        segments    1  1  1  1 | 1  1  1  0

    With document masks and several documents in a row, the prompt follows the last one and sees
    only it; `document_mask=False`, or documents longer than a row, give the paper's rows of one
    text. The e of the picture may be an end-of-document token.

    Paper and code (clx1415926/EndPrompt at 9a76e4e): the method is "fixed". Its prompt lies in
    tokenised data that was not published, 20 tokens long by the script and 18 by the README, so
    there is no default here. The released random variant takes no prompt but the last m tokens of
    the document, and puts them at a random place: `prompt=20, position="random"` does this with the
    row's own last 20 inputs. As released, a text that is not longer than m then stays contiguous.

    Attributes:
        target_length: positions are below it; at least the row's length.
        prompt: text, tokens, or how many of the row's own last inputs to move.
        position: "fixed" or "random".
        tokenizer: spec of the tokenizer for a prompt given as text; the data's.
        prompt_weight: loss weight of the prompt's tokens, 1.0 as released; they count as tokens of
          the domain of the row's last token.
    """

    target_length: int
    prompt: str | tuple[int, ...] | list[int] | int
    position: str = "fixed"
    tokenizer: str = "byte"
    prompt_weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.num_prompt_tokens > 0:
            raise ValueError(f"prompt is {self.prompt!r}; give a text, tokens or a count above 0")
        if isinstance(self.prompt, tuple) and min(self.prompt) < 0:
            raise ValueError(f"prompt has token {min(self.prompt)}; tokens are 0 or more")
        if self.position not in ("fixed", "random"):
            raise ValueError(f"position {self.position!r} is unknown; use 'fixed' or 'random'")
        if not self.num_prompt_tokens < self.target_length <= 2**31:
            raise ValueError(
                f"target_length is {self.target_length}; give more than the prompt's "
                f"{self.num_prompt_tokens} tokens, 2**31 at most"
            )
        if not 0.0 <= self.prompt_weight < float("inf"):
            raise ValueError(f"prompt_weight is {self.prompt_weight}; give 0 or more")

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The tokens to add; none when the row's own are moved."""
        if isinstance(self.prompt, str):
            return _tokens(self.prompt, self.tokenizer)
        return () if isinstance(self.prompt, int) else tuple(self.prompt)

    @property
    def num_prompt_tokens(self) -> int:
        """Return m."""
        return self.prompt if isinstance(self.prompt, int) else len(self.prompt_tokens)

    def content_length(self, row_length: int) -> int:
        """The row without the prompt's cells; refuses rows with no room, or beyond the target."""
        _check_target(self.target_length, row_length)
        rest = row_length - self.num_prompt_tokens
        if rest < 1:
            raise ValueError(
                f"rows of {row_length} have no room for text beside a prompt of "
                f"{self.num_prompt_tokens} tokens; lengthen sequence_length"
            )
        return row_length if isinstance(self.prompt, int) else rest

    def _jump(self, num_text: np.ndarray, key: int, places_B: np.ndarray) -> np.ndarray:
        """How far the prompt's first token is moved from right behind the text, int64[B]."""
        most = self.target_length - self.num_prompt_tokens - num_text
        if self.position == "fixed":
            return np.maximum(most, 0)
        return hash_below(np.maximum(most, 0) + 1, key, places_B)

    def __call__(
        self, batch: Batch, *, step: int, num_steps: int, key: int, places_B: np.ndarray
    ) -> Batch:
        """Add or move the end of every row (see `lcl.data.batch.RowTransform`)."""
        runs = segment_runs(batch.segment_ids)
        if not len(runs.row):
            return batch
        last = np.append(runs.row[1:] != runs.row[:-1], True)  # the last segment of each row
        row, length = runs.row[last], runs.length[last]
        end = runs.start[last] + length
        places = np.asarray(places_B, np.int64)[row]
        if isinstance(self.prompt, int):
            return self._move(batch, row, end, length, key, places)
        return self._add(batch, row, end, key, places)

    def _move(self, batch, row, end, length, key, places) -> Batch:
        num_moved = self.num_prompt_tokens
        long = length > num_moved
        row, end, length, places = row[long], end[long], length[long], places[long]
        jump = self._jump(length - num_moved, key, places)
        cells = end[:, None] - num_moved + np.arange(num_moved)
        positions = np.array(batch.positions)
        positions[row[:, None], cells] += jump[:, None].astype(positions.dtype)
        return batch._replace(positions=positions)

    def _add(self, batch, row, end, key, places) -> Batch:
        prompt = np.array(self.prompt_tokens, np.int32)
        row_length = batch.tokens.shape[1]
        assert end.max() + len(prompt) <= row_length, "documents fill the prompt's cells"
        final = (row, end - 1)  # the text's last transition; its target is the text's last token
        inputs = np.broadcast_to(np.append(0, prompt[:-1]), (len(row), len(prompt))).copy()
        inputs[:, 0] = batch.targets[final]
        following = batch.positions[final].astype(np.int64) + 1
        positions = following[:, None] + np.arange(len(prompt))
        positions[:, 1:] += self._jump(following + 1, key, places)[:, None]
        fields = {name: np.array(getattr(batch, name)) for name in _CELLS}
        cells = (row[:, None], end[:, None] + np.arange(len(prompt)))
        fields["tokens"][cells] = inputs
        fields["targets"][cells] = prompt
        fields["positions"][cells] = positions
        fields["segment_ids"][cells] = batch.segment_ids[final][:, None]
        fields["source_ids"][cells] = batch.source_ids[final][:, None]
        fields["loss_weights"][cells] = self.prompt_weight
        return batch._replace(**fields)

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, as plain values: a text's tokens, not its spelling."""
        return {
            "target_length": self.target_length,
            "prompt": self.prompt if isinstance(self.prompt, int) else list(self.prompt_tokens),
            "position": self.position,
            "prompt_weight": float(self.prompt_weight),
        }


_CELLS = ("tokens", "targets", "segment_ids", "positions", "loss_weights", "source_ids")
