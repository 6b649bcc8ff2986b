"""The report on data: text, page and pictures say what the tables say; mistakes are one line."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json

import numpy as np
import pytest

import lcl.report.data_text
from lcl.data import Mixture, Replay, StageData
from lcl.data.decomposition import Decomposition
from lcl.data.in_context import InContext
from lcl.data.testing import make_stores
from lcl.main import main
from lcl.report.data_page import build_data_report
from lcl.report.data_read import read_root, read_stages
from lcl.report.data_text import data_text, grid, ledger_line, spark
from tests.report.build_test import Page


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("stores"), {"a": 60, "b": 40}, seed=5)


@pytest.fixture(scope="module")
def report(data):
    """Every kind of stage there is something special to show of."""
    stages = [
        ("one", StageData(Mixture({"a": 1.0}), 64, 6), 11),
        ("two", StageData(Mixture({"b": 1.0}), 64, 6, replay=Replay(0.25)), 9),
        (
            "three",
            StageData(
                Mixture({"b": 1.0}),
                64,
                2,
                decomposition=Decomposition(4, 6, cycles=1, tails="drop"),
            ),
            20,
        ),
        (
            "four",
            StageData(
                Mixture({"a": 1.0}),
                64,
                4,
                packing="concat",
                document_mask=False,
                order=InContext(num_neighbors=4),
            ),
            5,
        ),
    ]
    return read_stages(data, stages, seed=0, title="four <stages>")


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    return build_data_report(report, tmp_path_factory.mktemp("out"))


def test_the_text_has_every_table(report):
    text = data_text(report)
    for said in (
        "lengths of the training documents",
        "needless",
        "buckets 16-64",
        "tokens by source",
        "similarity of neighbouring documents",
        "InContext",
        "sample rows",
        "stage two, step 15, row 7: a, replayed, pass 0, 64 cells",
    ):
        assert said in text, said
    dropped = next(plan for plan in report.plans if plan.layout == "buckets 16-64").line
    assert dropped.dropped_tokens > 0 and f"{dropped.dropped_tokens:,}" in text


def test_an_order_by_likeness_beats_a_shuffled_one(report):
    (path,) = report.paths
    assert path.similarity.mean() > path.shuffled.mean()
    assert len(path.similarity) + 1 == report.domains[0].lengths.num_documents


def test_the_page_is_whole_and_says_the_numbers(report, page):
    html = page.read_text()
    parsed = Page(html)
    assert not parsed.all("script") and not parsed.all("link") and "https://" not in html
    assert len(parsed.all("img")) == 3
    assert all(len(image["alt"]) > 30 for image in parsed.all("img"))
    assert "four <stages>" in parsed.text
    ledger = report.stream.ledger(report.stream.num_steps)
    for counts in ledger.values():
        assert f"{counts['new_tokens']:,}" in parsed.text
    for plan in report.plans:
        assert f"{plan.line.fill:.4f}" in parsed.text
    for row in report.samples:
        assert f"step {row.step:,}, row {row.place}" in parsed.text
    strips = [a for a in parsed.all("div") if a.get("class") == "strip"]
    assert len(strips) == len(report.samples)


def test_pictures_lie_beside_the_page(page):
    from PIL import Image

    names = {path.name for path in page.parent.iterdir()}
    kinds = ("lengths", "tokens", "similarity")
    files = {f"{k}{s}.{e}" for k in kinds for s in ("", "_dark") for e in ("png", "svg")}
    assert names == {"index.html"} | files
    for kind in kinds:
        picture = np.asarray(Image.open(page.parent / f"{kind}.png").convert("L"))
        assert picture.std() > 5  # something is drawn


def test_the_same_report_gives_the_same_bytes(report, page, tmp_path):
    assert build_data_report(report, tmp_path).read_bytes() == page.read_bytes()


def test_a_root_without_stages(data, tmp_path):
    report = read_root(data, sequence_length=512)
    text = data_text(report)
    assert "rows, as each layout would make them" in text and "buckets 16-512" in text
    assert {plan.layout for plan in report.plans} >= {"best_fit", "concat", "buckets 16-512"}
    best = {p.domain: p.line for p in report.plans if p.layout == "best_fit"}
    concat = {p.domain: p.line for p in report.plans if p.layout == "concat"}
    for domain, line in best.items():
        assert line.needless_cuts == 0 < concat[domain].needless_cuts
    page = Page(build_data_report(report, tmp_path).read_text())
    assert len(page.all("img")) == 1
    assert [line.domain for line in read_root(data, domains=["b"]).domains] == ["b"]


def test_text_of_documents_is_escaped(report, tmp_path):
    row = report.samples[0]
    nasty = dataclasses.replace(
        row, pieces=(row.pieces[0]._replace(text="<script>x</script>\x07"), *row.pieces[1:])
    )
    changed = dataclasses.replace(report, samples=(nasty,), paths=(), flow=None)
    page = Page(build_data_report(changed, tmp_path).read_text())
    assert not page.all("script") and "<script>x</script>�" in page.text


def test_the_ledger_is_told(data):
    line = ledger_line({"read": 4, "stored": {"train": 2, "heldout": 1}, "dropped": {"empty": 1}})
    assert line == "read 4 documents = 2 train + 1 heldout + 1 dropped (1 empty)"


def test_small_parts():
    assert spark([]) == "" and spark([0, 0]) == "  "
    assert spark([1e-9, 1.0]) == "▁█"  # what is there can be seen
    assert grid(["a"], []) == "  a"


@pytest.mark.parametrize("kind", ["root", "gin"])
def test_the_command(data, tmp_path, capsys, kind):
    if kind == "root":
        words = ["--root", data.root, "--domain", "a", "--sequence_length", "32"]
    else:
        stores = make_stores(tmp_path / "stores", {"alpha": 40, "beta": 40}, seed=3)
        words = ["--gin_file=tests/tiny.gin", f"--gin.Data.root='{stores.root}'"]
    assert main(["data", "report", *words, f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "sample rows" in said and f"report: {tmp_path / 'out' / 'index.html'}" in said
    assert (tmp_path / "out" / "index.html").exists()


def test_show_has_the_tables(data, capsys):
    assert main(["prepare", "--show", "--root", data.root]) == 0
    said = capsys.readouterr().out
    assert "licence" in said and "buckets of the decomposition" in said and "median" in said
    assert "sample rows" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --root, a run's directory or --gin_file"),
        (["--root", "x", "--gin_file=y"], "not several"),
        (["nowhere"], "holds no run"),
        (["--root", "nowhere"], "no stores in 'nowhere'"),
        (["--root", "ROOT", "--domain", "c"], "unknown domain 'c'"),
        (["--root", "ROOT", "--sequence_length", "1"], "give at least 2"),
        (["--root", "ROOT", "--out", "ROOT/a/train/meta.json"], "another --out"),
    ],
)
def test_mistakes_are_one_line(data, capsys, words, message):
    words = [word.replace("ROOT", data.root) for word in words]
    assert main(["data", "report", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("lcl data: ")


def test_docstring_examples_are_true():
    for name in ("data_text", "data_page", "data_plots", "data_read"):
        assert doctest.testmod(importlib.import_module(f"lcl.report.{name}")).failed == 0
    assert json.dumps(lcl.report.data_text.TERMS)
