"""What a run says of itself on its card, and when two runs are the same run.

The identity is every line of the configuration that decides a result, with the fingerprints of the
stores. A directory that holds a run goes on under the same identity only, but for stages that were
appended.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from lcl import files
from lcl.checkpoints import run_card
from lcl.data import Mixture, Stream
from lcl.stages import Span

__all__ = ["CONFIG_FILE", "check", "mean_flops", "stage_card", "what_decides", "write"]

# The whole configuration as gin text, beside the run card.
CONFIG_FILE = "config.gin"
# Fields of DecoderConfig that change how it is computed, and no result beyond rounding.
_HOW = ("attention_blocks", "context_layout", "remat", "scan_layers")
# What one may look at beside the evaluations: where it is None, no line says so, and a run that
# began before it could be asked for is still the same run.
_OPTIONAL = ("evaluation.branches", "evaluation.samples")


def check(run_dir: pathlib.Path, identity: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Refuses a directory that holds a run of another identity; none at all is fine.

    Raises:
      CheckpointError: one line that names what differs.
    """
    old = run_card.read_card(run_dir)
    if old is not None:
        grown = _without_appended_stages(identity, old["identity"])
        run_card.check_card(old["identity"], grown, allow_changes=allow_changes)


def write(run_dir: pathlib.Path, card: Mapping[str, Any]) -> None:
    """Writes the card, and its configuration as a file of its own where it has one."""
    run_card.write_card(run_dir, card)
    if card["config"] is not None:
        files.write_whole(run_dir / CONFIG_FILE, card["config"].encode())


def what_decides(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without what decides memory and time only: these may change in a run."""
    return {
        key: value
        for key, value in identity.items()
        if not key.startswith(tuple(f"model.{name}" for name in _HOW))
        and not (value is None and key in _OPTIONAL)
    }


def stage_card(
    span: Span, stream: Stream, by_shape: Mapping[tuple[int, int], float]
) -> dict[str, Any]:
    """A stage as the card tells it: its place, its domains, its shapes, its replay."""
    data = span.stage.data
    replay = None
    if data.replay is not None:
        replay = {"fraction": data.replay.fraction, "mode": data.replay.mode}
    constant = type(data.mixture) is Mixture
    card = {
        "name": span.stage.name,
        "first_step": span.first_step,
        "num_steps": span.end_step - span.first_step,
        "domains": dict(data.mixture.weights) if constant else stream.shares(span.index),
        "sequence_length": data.sequence_length,
        "batch_shape": list(stream.shapes(span.index)[0]),
        "replay": replay,
    }
    if data.decomposition is not None:
        card["buckets"] = [
            {**bucket, "flops_per_token": by_shape[bucket["batch_rows"], bucket["row_length"]]}
            for bucket in stream.buckets(span.index)
        ]
    return card


def mean_flops(by_shape: Mapping[tuple[int, int], float], stream: Stream, stage: int) -> float:
    """Training FLOPs a token of a whole stage: the shapes' mean, by how many steps have each."""
    if len(by_shape) == 1:
        return min(by_shape.values())
    steps = {(b["batch_rows"], b["row_length"]): b["num_steps"] for b in stream.buckets(stage)}
    return sum(each * steps[shape] for shape, each in by_shape.items()) / sum(steps.values())


def _without_appended_stages(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """`new` less the stages that `old` did not have yet: a run may always be given more stages."""
    had = sum(1 for key in old if key.startswith("stages[") and key.endswith("].name"))
    known = tuple(f"stages[{index}]" for index in range(had))
    return {k: v for k, v in new.items() if not k.startswith("stages[") or k.startswith(known)}
