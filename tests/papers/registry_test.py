"""Papers are found by their files; names, tiers and commands, and one-line refusals."""

from __future__ import annotations

import pathlib

import pytest

from lcl import config, main
from lcl.papers import code, registry

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NAMES = (
    *("cmr", "dataset_decomposition", "domain_order", "in_context_pretraining", "infinite_lr"),
    *("mer", "replay_scaling", "stability_gap"),
)


def test_the_papers():
    assert tuple(registry.names()) == NAMES


def test_a_new_file_is_a_new_paper(tmp_path, monkeypatch):
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "mine.py").write_text('"""Mine, small.\n\nMore."""\n\nPAPER = None\n')
    (folder / "helper.py").write_text('"""Speaks of PAPER = x, and is none."""\n')
    monkeypatch.setattr(registry, "FOLDER", folder)
    assert registry.names() == ["mine"] and registry.summary("mine") == "Mine, small."


@pytest.mark.parametrize("name", NAMES)
def test_what_a_paper_declares(name):
    paper, tiny = registry.load(name), registry.load(name, "tiny")
    assert paper.name == name and type(paper) is type(tiny) and paper != tiny
    assert "arXiv:" in paper.title and paper.equal and paper.columns
    names = [claim.name for claim in paper.claims]
    assert len(set(names)) == len(names)
    for claim in paper.claims:
        assert claim.better != claim.worse
        assert bool(claim.published) == bool(claim.source), claim.name


@pytest.mark.parametrize("name", NAMES)
def test_full_size_configurations_load(name):
    runs = registry.pod_runs(name)
    assert runs and len({run.arguments() for run in runs}) == len(runs)
    for run in runs:
        settings = config.load(list(run.gin_files), list(run.bindings)).kwargs("train", run_dir="x")
        assert settings["stages"] and settings["model"].num_layers >= 16


def test_list(capsys):
    assert main.main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(NAMES)
    assert main.main(["reproduce", "cmr", "--list"]) == 0
    assert "29.8 / 34.9 / 41.4 / 47.8%" in capsys.readouterr().out


def test_listing_needs_no_jax(run_python):
    statement = "from lcl import main\nmain.main(['reproduce', '--list'])\nimport sys\n"
    words = run_python(f"{statement}print('jax' in sys.modules)").split()
    assert words[-1] == "False"


def test_the_command_of_the_pod_tier(capsys):
    assert main.main(["reproduce", "cmr", "--tier", "pod", "--abstract"]) == 0
    out = capsys.readouterr().out
    assert "lcl train --gin_file=configs/papers/pods/cmr.gin --run_dir=DIR/1_4" in out
    # The two ratios are one program: it is looked at once.
    assert out.count("From shapes alone") == 1
    assert "batch 1024 x 2,048 tokens" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mre"], "unknown paper 'mre'; did you mean 'mer'?"),
        ([], "no paper: name one of cmr, "),
        (["mer", "--tier", "tiny", "--claim", "25% repla"], "did you mean '25% replay'?"),
        (["mer", "--tier", "tiny", "--seeds", "0"], "seeds is 0; give 1 or more"),
        (["mer", "--gin.train.seed=1"], "takes no --gin"),
    ],
)
def test_refusals(words, said, capsys, tmp_path):
    assert main.main(["reproduce", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_code_hash_knows_what_computes():
    """Of the files that can change a number, and of no paper's own."""
    seen = []
    for path in (REPOSITORY / "lcl").rglob("*.py"):
        name = path.relative_to(REPOSITORY / "lcl").as_posix()
        if not name.startswith(code._DECIDES_NOTHING) and not code.is_paper(path):
            seen.append(name)
    assert {"step.py", "optim/adamw.py", "data/replay.py", "papers/measures.py"} <= set(seen)
    assert {"models/decoder.py", "evals/loss_matrix.py", "papers/cmr_fit.py"} <= set(seen)
    assert not {"main.py", "report/plots.py", "papers/mer.py", "papers/claims.py"} & set(seen)


def test_a_changed_line_is_another_hash_and_a_changed_comment_is_not(tmp_path):
    def hashed(text):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / "optim").mkdir(parents=True)
        (root / "optim" / "rate.py").write_text(text)
        return code.code_hash(root)

    first = hashed('"""A rate."""\n\ndef rate(n):\n    """Rate."""\n    return n + 1\n')
    assert first == hashed('"""Another word."""\n\ndef rate(n):\n    return n + 1  # why\n')
    assert first != hashed('"""A rate."""\n\ndef rate(n):\n    """Rate."""\n    return n + 2\n')
