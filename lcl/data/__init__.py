"""Documents in, batches out: tokenised stores and the integer plans over them.

Names are imported when they are first used, so `import lcl.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module it lives in.
_HOMES = {
    "Batch": "batch",
    "Data": "store",
    "Layout": "packing",
    "Mixture": "mixture",
    "Replay": "replay",
    "StageData": "planner",
    "Store": "store",
    "StoreWriter": "store",
    "Stream": "stream",
    "Tokenizer": "tokenizers",
    "build_stream": "stream",
    "eval_batches": "batch",
    "load_tokenizer": "tokenizers",
    "pack": "packing",
    "shuffle": "ordering",
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
