"""Reports: what a run writes as it goes, its progress line, and the page built from them."""

from __future__ import annotations

import importlib
from typing import Any

from lcl.report.progress import Progress
from lcl.report.trackers import Tracker, WandB
from lcl.report.writers import MetricsWriter

# Imported when first used: a training loop needs none of them until it ends.
_LAZY = {
    "Run": "lcl.report.read",
    "Diff": "lcl.report.diff",
    "build_report": "lcl.report.build",
    "diff_runs": "lcl.report.diff",
    "info_text": "lcl.report.text",
    "load_runs": "lcl.report.read",
    "matrix_text": "lcl.report.text",
    "summary_png": "lcl.report.build",
}

__all__ = [
    "Diff",
    "MetricsWriter",
    "Progress",
    "Run",
    "Tracker",
    "WandB",
    "build_report",
    "diff_runs",
    "info_text",
    "load_runs",
    "matrix_text",
    "summary_png",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
