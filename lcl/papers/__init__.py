"""Papers, small and honest: what each claims, the runs that decide it, and the verdicts.

Nothing is imported until it is used: `from lcl.papers.claims import interval` costs NumPy only.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module it lives in.
_HOMES = {
    "Claim": "claims",
    "DatasetDecomposition": "dataset_decomposition",
    "InContextPretraining": "in_context_pretraining",
    "Paper": "paper",
    "PaperRun": "grid",
    "PodRun": "registry",
    "Probe": "grid",
    "StreamMeasures": "measures",
    "TopicalCorpus": "topics",
    "reproduce": "paper",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
