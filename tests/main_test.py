"""The command line: one line and exit code 2 for a mistake, help without heavy imports."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lcl.main import main, split_gin
from tests import tiny

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def lcl(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lcl.main", *words],
        env=dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> pathlib.Path:
    """A finished tiny run, made through the command line."""
    base = tmp_path_factory.mktemp("main")
    tiny.stores(base / "stores")
    code = main(
        [
            *("train", "--gin_file=tests/tiny.gin", f"--run_dir={base / 'run'}"),
            *(f"--gin.Data.root='{base / 'stores'}'", "--gin.Stage.steps=4"),
            "--gin.Logging.report=True",
        ]
    )
    assert code == 0
    return base / "run"


def test_train_leaves_config_card_logs_and_report(run_dir):
    for name in ("config.gin", "run_card.json", "metrics.jsonl", "evals.jsonl", "timings.jsonl"):
        assert (run_dir / name).exists()
    assert (run_dir / "report" / "index.html").exists()
    assert any((run_dir / "tensorboard").iterdir())
    assert "Stage.steps = 4" in (run_dir / "config.gin").read_text()


def test_a_run_goes_on_from_its_own_configuration(run_dir, capsys):
    assert main(["train", f"--run_dir={run_dir}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run_dir / "evals.jsonl").read_text().splitlines()[-1])
    assert found == {"step": 8, "domains": last["domains"]}
    assert main(["evaluate", str(run_dir), "--step", "4"]) == 0
    assert "held-out loss at step 4" in capsys.readouterr().out
    assert main(["info", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "alpha" in shown and "checkpoints" in shown and "Stage.steps = 4" in shown
    assert main(["report", str(run_dir)]) == 0
    assert "after beta" in capsys.readouterr().out


def test_a_run_made_from_python_says_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "was run from Python and holds no config.gin: call lcl.train" in capsys.readouterr().err


MISTAKES = {
    "a misspelt binding": (["train", "--gin_file=tests/tiny.gin", "--gin.train.sed=1"], "seed"),
    "a misspelt object": (["train", "--gin_file=tests/tiny.gin", "--gin.Stag.steps=1"], "Stage"),
    "a misspelt file": (["train", "--gin_file=tests/tny.gin"], "tiny.gin"),
    "a value of the wrong type": (
        ["train", "--gin_file=tests/tiny.gin", "--gin.Stage.steps='ten'"],
        "steps",
    ),
    "a schedule that another replaced": (
        [
            *("train", "--gin_file=tests/tiny.gin", "--gin_file=configs/methods/cosine.gin"),
            "--gin.infinite.peak=1e-3",
        ],
        "infinite.peak has no effect, as nothing refers to @infinite(); write AdamW.schedule = ",
    ),
    "no configuration": (["train", "--run_dir=nowhere"], "--gin_file"),
    "no store": (
        ["train", "--gin_file=tests/tiny.gin", "--run_dir=RUN", "--gin.Data.root='nowhere'"],
        "lcl prepare",
    ),
    "an unknown corpus": (["prepare", "pythn", "--root=RUN"], "python"),
    "nothing to prepare": (["prepare"], "--list"),
    "an empty folder": (["prepare", "--folder=mine=RUN", "--root=RUN/store"], "RUN"),
    "a folder without a name": (["prepare", "--folder=here"], "NAME=PATH"),
    "no run": (["info", "nowhere"], "nowhere"),
    "no run to evaluate": (["evaluate", "nowhere"], "nowhere"),
    "no run to branch": (["train", "--run_dir=nowhere", "--branch-at=4"], "nowhere holds no run"),
    "no run to score": (["score", "nowhere", "--domain=alpha"], "nowhere holds no run"),
    "no run's data": (["data", "report", "nowhere"], "nowhere holds no run"),
    "no run to report": (["report", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, tmp_path, capsys):
    words, named = MISTAKES[case]
    words = [word.replace("RUN", str(tmp_path)) for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert named.replace("RUN", str(tmp_path)) in error
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error


def test_a_misspelt_binding_from_the_shell():
    done = lcl("train", "--gin_file=tests/tiny.gin", "--gin.DecoderConfig.num_layer=3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "num_layers" in done.stderr


def test_print_config_prints_what_would_run(capsys):
    words = ["train", "--gin_file=tests/tiny.gin", "--run_dir=x", "--gin.Data.root='stores'"]
    assert main([*words, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "train.run_dir = 'x'" in text and "Replay.fraction = 0.5" in text


def test_gin_words_are_taken_out_wherever_they_stand():
    words = ["--gin.a=1", "train", "--gin_file", "f.gin", "--gin.b", "2", "--run_dir=r"]
    assert split_gin(words) == (["train", "--run_dir=r"], ["f.gin"], ["a=1", "b=2"])
