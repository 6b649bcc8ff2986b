"""Documents in, batches out: tokenised stores and the integer plans over them.

Names are imported when they are first used, so `import lcl.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module it lives in.
_HOMES = {
    "BalancedByStage": "replay_buffers",
    "Batch": "batch",
    "ChainOrder": "in_context",
    "Contiguous": "replay_buffers",
    "Data": "store",
    "Decomposition": "decomposition",
    "EndPrompt": "positions",
    "Everything": "replay_buffers",
    "FromFunction": "embeddings",
    "GrowLinear": "curricula",
    "GrowP100": "curricula",
    "GrowP2": "curricula",
    "HashedTfidf": "embeddings",
    "InContext": "in_context",
    "KNNOrder": "in_context",
    "Layout": "packing",
    "LinearMixture": "mixture_curricula",
    "Mixture": "mixture",
    "PoSE": "positions",
    "Precomputed": "embeddings",
    "RandomPositions": "positions",
    "ReleasedOrder": "in_context",
    "Replay": "replay",
    "Reservoir": "replay_buffers",
    "SentenceEncoder": "embeddings",
    "ShrinkP100": "curricula",
    "SkyLadder": "windows",
    "StageData": "stage_data",
    "StagedMixture": "mixture_curricula",
    "Store": "store",
    "StoreWriter": "store",
    "Stream": "stream",
    "Subset": "mixture_subset",
    "TokenBudgets": "mixture_curricula",
    "Tokenizer": "tokenizers",
    "Uniform": "curricula",
    "build_stream": "stream",
    "decompose": "decomposition",
    "eval_batches": "batch",
    "load_tokenizer": "tokenizers",
    "pack": "packing",
    "read_scores": "scores",
    "shuffle": "ordering",
    "traverse": "ordering",
    "write_scores": "scores",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
