"""Things one looks at while a run trains, and which change nothing in it. See README.md."""

from __future__ import annotations

from lcl.analysis.alignment import GradientAlignment
from lcl.analysis.diagnostic import Diagnostic, Diagnostics

__all__ = ["Diagnostic", "Diagnostics", "GradientAlignment"]
