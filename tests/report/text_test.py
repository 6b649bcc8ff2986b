"""What `lcl report` and `lcl info` print."""

from __future__ import annotations

import json
import shutil

import pytest

from lcl.evals.loss_matrix import SIGNS
from lcl.report import info_text, load_runs, matrix_text
from lcl.report.text import held_equal


def test_one_run_shows_the_matrix_in_both_units_and_the_signs(runs):
    text = matrix_text(runs["plain"])
    assert "held-out loss, nats/token" in text and "held-out loss, bits/byte" in text
    assert text.count(SIGNS) == 1
    matrix = load_runs([runs["plain"]])[0].loss_matrix()
    assert f"*{matrix.values[1, 0]:.3f}" in text
    assert f"{matrix.mean_forgetting:+.3f}" in text


def test_two_runs_side_by_side_show_the_difference_and_what_is_equal(runs):
    text = matrix_text([runs["plain"], runs["replay"]])
    a, b = (r.loss_matrix("bits_per_byte") for r in load_runs([runs["plain"], runs["replay"]]))
    row = next(x for x in text.splitlines() if x.startswith("python"))
    assert row.split() == [
        "python",
        f"{a.forgetting['python']:+.3f}",
        f"{b.forgetting['python']:+.3f}",
        f"{b.forgetting['python'] - a.forgetting['python']:+.3f}",
    ]
    assert "held equal: new tokens, steps" in text
    assert "not: all trained tokens (184,320 |" in text and "replay" in text.split("not: ")[1]


def test_held_equal_says_nothing_of_what_is_not_known(runs):
    equal, different = held_equal(load_runs([runs["plain"], runs["half"]]))
    assert "new tokens" not in equal and "new tokens" not in different
    assert "steps" in different and "seed" in equal


def test_runs_of_different_domains_have_dashes(runs):
    text = matrix_text([runs["plain"], runs["half"], runs["replay"]])
    row = [x for x in text.splitlines() if x.startswith("manpages-ja")][0]
    assert row.split()[1] == "–"
    assert "half is at step 47 of 90" in text


def test_a_run_without_evaluations_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage": "a", "loss": 2.0}\n')
    assert "no evaluation yet" in matrix_text([tmp_path])


def test_without_bytes_there_is_one_table(runs, tmp_path):
    shutil.copytree(runs["plain"], tmp_path / "run")
    path = tmp_path / "run" / "evals.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    for line in lines:
        for values in line["domains"].values():
            values["bits_per_byte"] = None
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert "bits/byte" not in matrix_text(tmp_path / "run")


def test_info_shows_stages_checkpoints_and_configuration(runs):
    (runs["half"] / "checkpoints" / "40").mkdir(parents=True, exist_ok=True)
    text = info_text(runs["half"])
    assert text.startswith("half: at step 47 of 90")
    assert "checkpoints    40" in text
    assert "1 python  steps 0-29  python 100%  8 x 256  done" in text
    assert "2 manpages-en  steps 30-59  manpages-en 100%  8 x 256  running" in text
    assert "DecoderConfig.num_layers = 4" in text


def test_not_a_run(tmp_path):
    for show in (matrix_text, info_text):
        with pytest.raises(ValueError, match="not a run directory"):
            show(tmp_path)
