"""The page: self-contained, complete, honest about unfinished runs, the same for the same logs."""

from __future__ import annotations

import doctest
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import lcl.report.figures
import lcl.report.page
import lcl.report.plots
import lcl.report.samples
from lcl.evals.loss_matrix import LossMatrix
from lcl.report import build_report, load_runs, summary_png
from lcl.report.heat import shares
from lcl.report.page import heat_table
from lcl.report.plots import spread
from tests.report.html_page import Page


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    groups = {"one": ["replay"], "half": ["half"], "two": ["plain", "replay"]}
    return {
        name: build_report([runs[r] for r in group], out / name) for name, group in groups.items()
    }


@pytest.mark.parametrize("name", ["one", "half", "two"])
def test_the_page_needs_nothing_else(pages, name):
    html = pages[name].read_text()
    page = Page(html)
    assert not page.all("script") and not page.all("link")
    assert "http://" not in html and "https://" not in html
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 30
    assert page.all("img") and page.all("meta")[1]["name"] == "viewport"
    assert "prefers-color-scheme: dark" in html
    # A scheme and a screen each have their own image.
    assert len(page.all("source")) == 3 * len(page.all("img"))
    assert pages[name].stat().st_size < 2_000_000


def test_the_page_of_one_run_has_everything(pages, runs):
    text = Page(pages["one"].read_text()).text
    matrix = load_runs([runs["replay"]])[0].loss_matrix("bits_per_byte")
    for value in matrix.values.flat:
        assert f"{value:.3f}" in text
    assert f"{matrix.mean_forgetting:+.3f}" in text
    for said in (
        "finished: step 90 of 90",
        "forgetting > 0 = forgot",
        "61,440",  # new tokens of a domain
        "FLOP convention",
        "DecoderConfig.num_layers = 4",
        "Data fingerprints",
        "Evaluated every 10 steps",
        "+ 25% replay (add)",
    ):
        assert said in text, said


def test_figures_lie_beside_the_page(pages):
    files = {p.name for p in pages["one"].parent.iterdir()}
    themed = {f"{n}{t}" for n in ("heldout", "training", "matrix") for t in ("", "_dark")}
    figures = {f"{name}.{kind}" for name in {*themed, "summary"} for kind in ("png", "svg")}
    assert files == {"index.html"} | figures
    # Each is linked, and every link is to a file that is there.
    assert {a["href"] for a in Page(pages["one"].read_text()).all("a")} == figures
    for name in figures:
        data = (pages["one"].parent / name).read_bytes()
        assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data[:2000]
    assert not any(name.endswith(".tmp") for name in files)
    assert (pages["one"].parent / "summary.png").stat().st_size < 150_000


def test_a_running_job_is_reported_as_far_as_it_has_come(pages):
    text = Page(pages["half"].read_text()).text
    assert "step 47 of 90" in text and "After 1 of 3 stages" in text
    assert "Where the tokens came from" not in text  # the ledger is written at the end


def test_a_comparison_begins_with_the_tables(pages):
    text = Page(pages["two"].read_text()).text
    assert text.index("Forgetting") < text.index("Loss matrices") < text.index("Run card")
    assert "Held equal: new tokens, steps" in text and "difference" in text


def test_the_same_logs_give_the_same_bytes(pages, runs, tmp_path):
    again = build_report(runs["half"], tmp_path)
    for path in pages["half"].parent.iterdir():
        assert (again.parent / path.name).read_bytes() == path.read_bytes(), path.name


def test_where_the_page_goes(runs):
    assert build_report(runs["half"]) == runs["half"] / "report" / "index.html"


@pytest.mark.parametrize("missing", ["evals.jsonl", "timings.jsonl", "run_card.json"])
def test_missing_parts_are_left_out(runs, tmp_path, missing):
    for path in runs["plain"].iterdir():
        if path.is_file() and path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = Page(build_report(tmp_path).read_text()).text
    assert "Training loss" in text
    assert ("No evaluation has been written yet" in text) == (missing == "evals.jsonl")


def test_a_run_that_has_not_begun(tmp_path):
    card = {"stages": [{"name": "a", "num_steps": 5, "domains": {"x": 1}}]}
    (tmp_path / "run_card.json").write_text(json.dumps(card))
    assert "step 0 of 5" in Page(build_report(tmp_path).read_text()).text


def test_names_are_escaped(runs, tmp_path):
    run_dir = tmp_path / "a<b>&c"
    run_dir.mkdir()
    for path in runs["half"].iterdir():
        if path.is_file():
            text = path.read_text().replace("manpages-en", "x<i>")
            (run_dir / path.name).write_text(text)
    page = Page(build_report(run_dir).read_text())
    assert not page.all("i") and not page.all("b")
    assert "a<b>&c" in page.text and "x<i>" in page.text


def test_an_unwritable_place_is_one_line(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the report.*another --out") as error:
        build_report(runs["half"], tmp_path / "file")
    assert "\n" not in str(error.value)


def test_summary_png_is_one_small_picture(runs, tmp_path):
    from PIL import Image

    path = summary_png([runs["plain"], runs["replay"]], tmp_path / "example.png")
    assert path.stat().st_size < 150_000
    assert Image.open(io.BytesIO(path.read_bytes())).size == (1040, 640)


def test_no_figure_is_left_open(pages):
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_matplotlib_is_imported_only_for_a_picture(runs):
    code = (
        "import sys; from lcl.report import matrix_text, info_text; "
        f"matrix_text({str(runs['plain'])!r}); info_text({str(runs['plain'])!r}); "
        "bad = {'matplotlib', 'jax', 'tensorflow', 'PIL'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


# The small parts.


def test_colours_of_the_heat_map_compare_within_a_column():
    matrix = LossMatrix(
        [[4.0, 100.0], [2.0, 50.0], [3.0, 75.0]], ["a", "b"], ["s", "t"], ["a", "b"]
    )
    np.testing.assert_allclose(shares(matrix), [[0, 0], [1, 1], [0.5, 0.5]])


def test_a_heat_map_with_holes():
    matrix = LossMatrix([[np.nan, np.nan], [2.0, np.nan]], ["a", "b"], ["s"], ["a"])
    page = Page(heat_table(matrix, shares(matrix), "caption"))
    assert page.text.count("–") == 3 and "nan" not in str(page.tags)
    homes = [a for a in page.all("td") if a.get("class") == "home"]
    assert len(homes) == 1


def test_labels_keep_their_distance_and_order():
    places = spread([0.0, 0.01, 0.02, 0.5, 0.99], 0.1, 0.0, 1.0)
    assert places == sorted(places)
    assert min(np.diff(places)) >= 0.1 - 1e-9
    assert places[3] == 0.5


def test_docstring_examples_are_true():
    for module in (lcl.report.page, lcl.report.plots, lcl.report.figures, lcl.report.samples):
        assert doctest.testmod(module).failed == 0
