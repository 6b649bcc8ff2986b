"""Reading run directories: finished, running, torn, incomplete, and none at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lcl.report import Run, load_runs


def test_a_finished_run(runs):
    run = Run.load(runs["plain"])
    assert run.finished and run.steps_done == run.num_steps == 90
    assert run.domains == ("python", "manpages-en", "manpages-fr")
    assert run.name == "plain" and run.has_bytes
    matrix = run.loss_matrix()
    assert matrix.values.shape == (4, 3) and np.isfinite(matrix.values).all()
    assert run.tokens() == (90 * 8 * 256, 90 * 8 * 256)
    rate, mfu, seconds = run.speed()
    assert rate > 0 and mfu == 0.38 and seconds > 0


def test_a_run_that_is_still_going(runs):
    run = Run.load(runs["half"])
    assert not run.finished and run.steps_done == 47 and run.num_steps == 90
    assert run.loss_matrix().stages == ("python",)
    assert run.ledger() is None  # the card was written before the first step
    assert run.tokens() == (None, 47 * 8 * 256)
    steps, values = run.heldout("manpages-ja")
    assert steps.tolist() == [0, 10, 20, 30, 40] and len(values) == 5


def test_a_branch_is_no_point_of_the_curve(runs, tmp_path):
    """It stands before the line of the stage whose end it shares, with another loss."""
    shutil.copytree(runs["plain"], tmp_path / "run")
    path = tmp_path / "run" / "evals.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    end = next(line for line in lines if line["kind"] == "stage_end")
    before = Run.load(tmp_path / "run").heldout("python")
    scores = {domain: {"nats_per_token": 0.5} for domain in end["domains"]}
    branch = end | {"kind": "branch", "branch_from": end["step"] - 5, "domains": scores}
    lines.insert(lines.index(end), branch)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = Run.load(tmp_path / "run").heldout("python")
    assert [x.tolist() for x in after] == [x.tolist() for x in before]


def test_a_torn_last_line_is_passed_over(runs, tmp_path):
    shutil.copytree(runs["plain"], tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 90, "lo')
    assert Run.load(tmp_path / "run").steps_done == 90


def test_series_leave_out_what_is_not_a_number(tmp_path):
    lines = [
        {"step": 0, "stage": "a", "loss": 2.0},
        {"step": 1, "stage": "a", "left_out": True},
        {"step": 2, "stage": "a", "loss": None, "nonfinite": {"loss": "nan"}},
        {"step": 3, "stage": "b", "loss": 1.0, "loss/x": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    run = Run.load(tmp_path)
    steps, values = run.series("loss")
    assert steps.tolist() == [0, 3] and values.tolist() == [2.0, 1.0]
    # No card: the stages are those that the metrics name.
    assert [(s.name, s.first_step, s.num_steps) for s in run.stages] == [("a", 0, 3), ("b", 3, 1)]
    assert run.stages[1].domains == {"x": 1.0}


def test_a_card_alone_is_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "run_card.json").write_text('{"stages": [{"name": "a", "num_steps": 5}]}')
    run = Run.load(tmp_path)
    assert (run.steps_done, run.num_steps, run.finished) == (0, 5, False)
    assert run.loss_matrix().values.shape == (1, 0)


def test_a_stage_that_ends_on_an_interval_has_one_point(runs):
    steps, _ = Run.load(runs["plain"]).heldout("python")
    assert len(np.unique(steps)) == len(steps)


def test_names_tell_runs_apart(runs, tmp_path):
    for parent in ("one", "two"):
        shutil.copytree(runs["plain"], tmp_path / parent / "run")
    loaded = load_runs([tmp_path / "one" / "run", tmp_path / "two" / "run"])
    assert [run.name for run in loaded] == ["one/run", "two/run"]


def test_not_a_run_names_the_runs_nearby(runs, tmp_path):
    with pytest.raises(ValueError, match="not a run directory .*runs nearby: .*half") as error:
        Run.load(runs["plain"].parent)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not exist; runs nearby: .*plain"):
        Run.load(runs["plain"].parent / "plian")
    with pytest.raises(ValueError, match="give the --run_dir of a run"):
        Run.load(tmp_path / "alone" / "run")


def test_other_bad_input_is_one_line(runs, tmp_path):
    with pytest.raises(ValueError, match="no run to report on"):
        load_runs([])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([runs["plain"], runs["plain"]])
    (tmp_path / "run_card.json").write_text("{oops")
    with pytest.raises(ValueError, match="is not JSON") as error:
        Run.load(tmp_path)
    assert "\n" not in str(error.value)
