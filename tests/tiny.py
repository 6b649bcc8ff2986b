"""The smallest run that has everything: two domains, two stages, replay, checkpoints."""

from __future__ import annotations

import pathlib
from typing import Any

from lcl.checkpoints import CheckpointPolicy
from lcl.data import Data, Mixture, Replay, StageData
from lcl.data.testing import make_stores
from lcl.evals import HeldOut
from lcl.models import DecoderConfig
from lcl.objectives import NextToken
from lcl.optim import AdamW, infinite
from lcl.parallel import MeshConfig
from lcl.policies import Guard, Logging
from lcl.stages import Stage

MODEL = DecoderConfig(
    vocab_size=384,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    context_length=64,
    tie_embeddings=True,
)


def stage(name: str, steps: int = 6, replay: Replay | None = None, **changes: Any) -> Stage:
    """A stage on the domain of its own name; 8 new rows of 64 tokens a step."""
    data = StageData(mixture=Mixture({name: 1.0}), sequence_length=64, batch_size=8, replay=replay)
    return Stage(name=name, data=data, steps=steps, **changes)


def stores(root: pathlib.Path) -> Data:
    """Two made-up languages, forty documents each."""
    return make_stores(root, {"alpha": 40, "beta": 40}, seed=3)


def settings(root: pathlib.Path, run_dir: pathlib.Path | str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `train` for a run of two stages of six steps; `changes` win.

    Args:
      root: where the stores lie, or go if there are none yet.
      run_dir: the run's directory.
      **changes: arguments of `train` to replace.
    """
    data = Data(str(root)) if (root / "alpha").exists() else stores(root)
    return {
        "run_dir": run_dir,
        "seed": 0,
        "model": MODEL,
        "data": data,
        "stages": (stage("alpha"), stage("beta", replay=Replay(0.5, mode="substitute"))),
        "optimizer": AdamW(
            schedule=infinite(
                peak=1e-2, constant=5e-3, final=1e-4, warmup_steps=2, cooldown_steps=4
            )
        ),
        "objective": NextToken(),
        "mesh": MeshConfig(),
        "checkpoint": CheckpointPolicy(every_steps=4),
        "evaluation": HeldOut(rows_per_domain=8, sequence_length=64, batch_size=8),
        "logging": Logging(every_steps=2, tensorboard=False, progress=False, report=False),
        "guard": Guard(),
    } | changes
