"""What a page says of a run's forgetting, gaps, branches, gradients and samples; and when not."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from lcl.report import build_report
from lcl.report.alignment import cosines, draw_alignment
from lcl.report.branches import branches_section
from lcl.report.plots import LIGHT, draw_heldout, pyplot
from lcl.report.read import Run
from lcl.report.retention import gap_section
from lcl.report.samples import samples_section, visible
from lcl.report.testing import write_run
from tests.report.html_page import Page

BITS, NATS = "bits_per_byte", "nats_per_token"
HEADINGS = {
    "gap": "the stability gap",
    "branches": "Branches: annealed",
    "alignment": "pull the same way",
    "samples": "Samples",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that has everything."""
    return write_run(
        tmp_path_factory.mktemp("full") / "full",
        steps_per_stage=30,
        eval_every=5,
        replay=0.25,
        branch_steps=10,
        look_every=4,
        samples=True,
    )


@pytest.fixture(scope="module")
def page(full, tmp_path_factory):
    return build_report(full, tmp_path_factory.mktemp("out"))


def copy(run_dir, to):
    """A run's own files, without its report."""
    return shutil.copytree(run_dir, to, ignore=shutil.ignore_patterns("report"))


def cells(html):
    """The rows of all tables as lists of text; a row that shares its neighbour's name lacks it."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    return [[Page(c).text for c in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows]


def test_a_full_run_has_all_sections(page):
    html = page.read_text()
    text = Page(html).text
    for heading in HEADINGS.values():
        assert heading in text, heading
    assert "worst stability gap" in text and len(html) < 2_000_000
    files = {path.name for path in page.parent.iterdir()}
    assert {f"alignment{t}.{e}" for t in ("", "_dark") for e in ("png", "svg")} <= files
    assert {a["href"] for a in Page(html).all("a")} == files - {"index.html"}


def test_a_plain_run_says_nothing_of_what_it_has_not(tmp_path):
    """One stage, no replay: nothing was forgotten, nothing branched, nothing was looked at."""
    run_dir = write_run(tmp_path / "plain", domains=["python"], steps_per_stage=20)
    text = Page(build_report(run_dir).read_text()).text
    for heading in HEADINGS.values():
        assert heading not in text, heading
    for word in ("best before", "backward", "Diamonds", "worst stability gap", "ZSCL"):
        assert word not in text, word
    assert "learned" in text and "anytime" in text
    assert not list(run_dir.glob("report/alignment*"))


@pytest.mark.parametrize("lost", ["branches", "alignment", "samples"])
def test_each_section_goes_by_itself(full, tmp_path, lost):
    run_dir = copy(full, tmp_path / "run")
    if lost == "samples":
        (run_dir / "samples.jsonl").unlink()
    else:
        name, key = {"branches": ("evals", '"branch"'), "alignment": ("metrics", "cosine")}[lost]
        path = run_dir / f"{name}.jsonl"
        kept = [line for line in path.read_text().splitlines() if key not in line]
        path.write_text("".join(f"{line}\n" for line in kept))
    text = Page(build_report(run_dir).read_text()).text
    assert {k for k, heading in HEADINGS.items() if heading not in text} == {lost}


def test_forgetting_and_transfer_by_domain(full, page):
    matrix = Run.load(full).loss_matrix(BITS)
    rows = cells(page.read_text())
    for domain in matrix.domains:
        best = np.nanmin(matrix.values[:-1, matrix.domains.index(domain)])
        want = [domain]
        for value in (
            None if matrix.forgetting[domain] is None else best,
            matrix.forgetting[domain],
            matrix.backward[domain],
            matrix.forward[domain],
        ):
            want.append("–" if value is None else f"{value:.3f}")
        signed = [want[0], want[1], *(w if w[0] in "-–" else f"+{w}" for w in want[2:])]
        assert signed in rows, signed
    means = [f"{x:+.3f}" for x in (matrix.mean_forgetting, matrix.bwt, matrix.fwt)]
    assert ["mean", "", *means] in rows
    text = Page(page.read_text()).text
    for said in ("> 0 = forgot", "mean: BWT", "average incremental", "evaluated every 5 steps"):
        assert said in text, said
    for value in (*matrix.average, matrix.average_incremental, *matrix.zscl.values()):
        assert f"{value:.3f}" in text
    assert f"{Run.load(full).stability_gap(BITS).anytime:.3f}" in text


def test_the_gap_table_is_the_stability_gaps(full):
    run = Run.load(full)
    gaps = run.stability_gap(NATS)
    html = "".join(gap_section(run, NATS))
    rows = cells(html)
    assert len(gaps.gaps) == 3  # one domain before the second stage, two before the third
    for one in gaps.gaps:
        back = {None: "not back", 0: "never rose"}.get(
            one.recovery_steps, f"back at +{one.recovery_steps}"
        )
        want = [
            one.domain,
            f"{one.worst:.3f}step +{one.worst_step}",
            f"{one.gap:+.3f}from {one.start:.3f}",
            f"{one.lasting:+.3f}{back}",
        ]
        assert any(row[-4:] == want for row in rows), want
    assert "nats/token, evaluated every 5 steps" in html
    for stage, value in gaps.wc_loss.items():
        if value is not None:
            assert [stage, f"{gaps.max_loss[stage]:.3f}", f"{value:.3f}"] in rows


def test_a_coarse_evaluation_says_that_the_gap_is_what_lasted(tmp_path):
    run = Run.load(write_run(tmp_path / "coarse", steps_per_stage=20, eval_every=20))
    assert "evaluated only once" in "".join(gap_section(run, BITS))


def test_branches_stand_beside_the_run_at_the_same_step(full):
    run = Run.load(full)
    rows = cells("".join(branches_section(run, BITS)))
    assert [(b.branch_from, b.step) for b in run.branches] == [(20, 30), (50, 60), (80, 90)]
    for branch in run.branches:
        for domain in run.domains:
            trunk = dict(zip(*(x.tolist() for x in run.heldout(domain, BITS)), strict=True))
            loss = branch.loss(domain, BITS)
            want = [
                domain,
                f"{trunk[branch.step]:.3f}from {trunk[branch.branch_from]:.3f}",
                f"{loss:.3f}{loss - trunk[branch.step]:+.3f}",
            ]
            assert any(row[-3:] == want for row in rows), want
    assert "20 + 10" in {row[0] for row in rows}


def diamonds(run):
    """(step, loss) of the branch marks in the held-out figure."""
    figure = draw_heldout(run, LIGHT, BITS)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    pyplot().close(figure)
    return sorted((int(m.get_xdata()[0]), round(float(m.get_ydata()[0]), 6)) for m in marks)


def test_branches_are_diamonds_in_the_held_out_figure(full, tmp_path):
    run = Run.load(full)
    every = [(b.step, round(b.loss(d, BITS), 6)) for b in run.branches for d in run.domains]
    assert diamonds(run) == sorted(every) and len(every) == 9
    # The run has not come to the end of the last one yet: it would lie off the axes.
    cut = write_run(tmp_path / "cut", steps_per_stage=30, branch_steps=10, stop=85)
    assert {step for step, _ in diamonds(Run.load(cut))} == {30, 60}


def test_a_branch_of_an_old_checkpoint_is_one_too(full, tmp_path):
    run_dir = copy(full, tmp_path / "run")
    folder = run_dir / "branches" / "00000025-5"
    folder.mkdir(parents=True)
    scores = {"python": {NATS: 1.25, BITS: 1.75}}
    start = {"step": 25, "stage_index": 0, "stage": "python", "kind": "start", "domains": scores}
    (folder / "evals.jsonl").write_text(json.dumps(start) + "\n")
    assert len(Run.load(run_dir).branches) == 3  # cut short: no end
    end = start | {"step": 30, "kind": "stage_end"}
    (folder / "evals.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
    branch = Run.load(run_dir).branches[1]
    assert (branch.branch_from, branch.anneal_steps) == (25, 5)
    assert branch.loss("python", BITS) == 1.75 and branch.loss("manpages-en", BITS) is None
    html = "".join(branches_section(Run.load(run_dir), BITS))
    assert "25 + 5" in html and "All 4 branches" in html  # the last of each stage, all in a fold


def test_a_branch_that_came_out_as_no_number_breaks_nothing(full, tmp_path):
    """Its null losses are no reason to leave bits/byte, no point of a curve, and no row's end."""
    run_dir = copy(full, tmp_path / "run")
    lines = [json.loads(line) for line in (run_dir / "evals.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "branch" and line["step"] == 60:
            for scores in line["domains"].values():
                scores |= {NATS: None, BITS: None}
            line["nonfinite"] = {"domains/python/nats_per_token": "nan"}
        if line["kind"] == "branch" and line["step"] == 90:
            line["domains"]["python"][BITS] = float("nan")  # as Python's own json writes it
    (run_dir / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run.load(run_dir)
    assert run.has_bytes
    html = build_report(run_dir).read_text()
    page = Page(html)
    assert "bits/byte" in page.text and not re.search(r"\bnan\b", page.text)
    row = next(row for row in cells(html) if row[0] == "50 + 10")
    assert row[-1] == "––"  # neither a loss nor a difference
    assert len(diamonds(run)) == 5


def test_the_evaluation_interval_is_the_runs_own(full, page):
    """Branches end between the evaluations of the run; they do not make it look denser."""
    assert "Evaluated every 5 steps" in Page(page.read_text()).text


def test_alignment_whole_and_by_layer(full, page):
    run = Run.load(full)
    found = cosines(run)
    assert list(found) == ["whole", "layer 0", "layer 1"]
    steps, values = found["whole"]
    assert steps.tolist() == list(range(32, 90, 4))  # the first stage replays nothing
    row = ["whole", "88", f"{values[-1]:+.3f}", f"{values.mean():+.3f}", f"{values.min():+.3f}"]
    assert row in cells(page.read_text())
    text = Page(page.read_text()).text
    assert "Looked at every 4 steps" in text and "A-GEM" not in text


@pytest.mark.parametrize("layers", [1, 40])
def test_alignment_of_one_look_and_of_many_layers(tmp_path, layers):
    line = {"step": 3, "stage": "a", "loss": 2.0, "gradient_cosine": -0.5}
    line |= {f"gradient_cosine/layer_{i:02d}": i / 100 for i in range(layers)}
    metrics = [{"step": 0, "stage": "a", "loss": 3.0, "gradient_cosine": None}, line]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    run = Run.load(tmp_path)
    figure = draw_alignment(run, LIGHT)
    names = [text.get_text() for text in figure.axes[0].texts]
    pyplot().close(figure)
    ends = ["layer 0", "layer 39"] if layers == 40 else ["layer 0"]
    assert sorted(n for n in names if n.startswith("layer")) == ends and "whole" in names
    text = Page(build_report(tmp_path).read_text()).text
    assert ("By layer (40)" in text) == (layers == 40) and "Looked at once" in text


def test_the_page_says_how_often_a_gem_changed_the_gradient(tmp_path):
    cosines_of, line = (0.5, -0.5, -0.1, 0.2, None), {"stage": "a", "loss": 2.0}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, cosine in enumerate(cosines_of):
            projected = None if cosine is None else float(cosine < 0)
            found = {"gradient_cosine": cosine, "gradient_projected": projected}
            file.write(json.dumps(line | {"step": step} | found) + "\n")
    text = Page(build_report(tmp_path).read_text()).text
    assert "A-GEM changed the gradient at 50% of the 4 logged." in text


def test_samples_are_folded_and_escaped(full, page):
    html = page.read_text()
    parsed = Page(html)
    assert not parsed.all("b") and "<b>opens</b> & " in parsed.text
    assert html.count("<details><summary>After ") == 3
    assert "After python, step 30: 1 continuation" in parsed.text
    assert len(parsed.all("mark")) == 3 and "closes ␀ what python wrote" in parsed.text
    assert "\x00" not in html and "closes the file." in parsed.text


def test_samples_of_hostile_text(tmp_path):
    line = {
        "step": 5, "stage": "<s>", "domain": "<img src=x>", "document": "</pre>",
        "prompt": "</pre></details><script>alert(1)</script>", "continuation": "\ud800 \x1b[31m",
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage": "<s>", "loss": 1.0}\n')
    torn = '{"step": 6, "stage": "x", "pro'
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n" + torn)
    html = "".join(samples_section(Run.load(tmp_path)))
    page = Page(html)
    assert not page.all("script") and not page.all("img") and len(page.all("details")) == 1
    assert line["prompt"] in page.text and "␛[31m" in page.text
    html.encode()  # half a surrogate pair is no UTF-8
    assert visible("a\tb\nc") == "a\tb\nc"


def test_names_are_escaped_in_every_section(full, tmp_path):
    run_dir = copy(full, tmp_path / "run")
    for path in run_dir.iterdir():
        path.write_text(path.read_text().replace("manpages-en", "x<i>&"))
    page = Page(build_report(run_dir).read_text())
    assert not page.all("i")
    assert page.text.count("x<i>&") > 20


def test_a_comparison_has_the_sections_of_each_run(full, runs, tmp_path):
    html = build_report([full, runs["plain"]], tmp_path).read_text()
    text = Page(html).text
    assert text.count(HEADINGS["gap"]) == 2
    for name in ("branches", "alignment", "samples"):
        assert text.count(HEADINGS[name]) == 1, name
    assert (tmp_path / "1_alignment.svg").exists() and (tmp_path / "2_matrix.svg").exists()
    assert {a["href"] for a in Page(html).all("a")} <= {p.name for p in tmp_path.iterdir()}
