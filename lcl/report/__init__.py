"""Reports: what a run writes as it goes, its progress line, and the page built from them."""

from __future__ import annotations

from lcl.report.progress import Progress
from lcl.report.writers import MetricsWriter

__all__ = ["MetricsWriter", "Progress"]
