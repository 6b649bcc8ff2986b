"""Made-up runs that the report's tests share; written once."""

from __future__ import annotations

import pytest

from lcl.report.testing import write_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Three run directories: plain, with replay, and one cut in its second stage."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "plain": write_run(root / "plain", steps_per_stage=30, eval_every=10),
        "replay": write_run(root / "replay", steps_per_stage=30, eval_every=10, replay=0.25),
        "half": write_run(
            root / "half", steps_per_stage=30, eval_every=10, stop=47, watched=["manpages-ja"]
        ),
    }
