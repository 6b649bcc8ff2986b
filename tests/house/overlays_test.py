"""The methods' and mixtures' overlays: what each changes in the quickstart is golden."""

from __future__ import annotations

import functools

import pytest

from lcl import config

BASE = "configs/runs/quickstart.gin"
OVERLAYS = [
    "configs/data/decomposition.gin",
    "configs/data/in_context.gin",
    "configs/data/mixture_linear.gin",
    "configs/data/mixture_staged.gin",
    "configs/data/subset_epochs.gin",
    "configs/data/token_budgets.gin",
    "configs/methods/a_gem.gin",
    "configs/methods/alignment.gin",
    "configs/methods/branches.gin",
    "configs/methods/endprompt.gin",
    "configs/methods/inverse_sqrt.gin",
    "configs/methods/pose.gin",
    "configs/methods/repeated_cosine.gin",
    "configs/methods/replay.gin",
    "configs/methods/replay_balanced.gin",
    "configs/methods/replay_contiguous.gin",
    "configs/methods/replay_reservoir.gin",
    "configs/methods/reptile.gin",
    "configs/methods/schedule_free.gin",
    "configs/methods/skyladder.gin",
    "configs/methods/within_batch_reptile.gin",
    "configs/methods/wsd.gin",
]


@functools.cache
def operative(*files: str) -> tuple[str, ...]:
    loaded = config.load(list(files))
    return tuple(loaded.operative_text("train", run_dir="runs/golden").splitlines())


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_an_overlay_changes_is_golden(name, golden):
    before, after = operative(BASE), operative(BASE, name)
    lines = [f"- {line}" for line in before if line not in after]
    lines += [f"+ {line}" for line in after if line not in before]
    assert lines
    golden(name.removesuffix(".gin") + ".diff", "\n".join(lines) + "\n")
