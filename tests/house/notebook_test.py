"""The notebook runs from top to bottom, at a tiny size, on eight devices of its own."""

from __future__ import annotations

import json
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "launch" / "notebook.ipynb"


def test_no_output_is_committed():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the dev extra has it")
    nbformat = pytest.importorskip("nbformat", reason="the dev extra has it")
    monkeypatch.setenv("LCL_NOTEBOOK_DIR", str(tmp_path))
    monkeypatch.setenv("LCL_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("LCL_NOTEBOOK_DOCUMENTS", "40")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "on 8 devices" in text
    assert "did you mean 'fsdp'?" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "report" / "index.html").exists()
