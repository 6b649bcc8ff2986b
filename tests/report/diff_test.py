"""`lcl diff`: every line in which two runs differ is named, and no other."""

from __future__ import annotations

import json
import shutil

import pytest

from lcl.main import main
from lcl.report.diff import ABSENT, Line, _bindings, diff_runs


@pytest.fixture
def pair(runs, tmp_path):
    """Two copies of one run, in two places."""
    for name in ("a", "b"):
        shutil.copytree(runs["plain"], tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def change_card(run_dir, **changes):
    card = json.loads((run_dir / "run_card.json").read_text())
    (run_dir / "run_card.json").write_text(json.dumps(card | changes))


def change_line(run_dir, name, number, change):
    path = run_dir / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    line = json.loads(lines[number])
    change(line)
    lines[number] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")


def test_two_copies_differ_in_nothing(pair, capsys):
    found = diff_runs(*pair)
    assert found.same and not found.sections and found.scores
    assert main(["diff", *map(str, pair)]) == 0
    assert "no line differs" in capsys.readouterr().out


def test_the_clock_and_the_place_are_no_difference(pair):
    change_card(pair[1], compiles={"train step": 99.0})
    (pair[1] / "timings.jsonl").write_text("")
    assert diff_runs(*pair).same


CARD = {
    "identity": (
        {"identity": {"seed": "0", "model.num_layers": "6"}},
        "what decides the result",
        Line("model.num_layers", "4", "6"),
    ),
    "seed": ({"seed": 5}, "seed", Line("seed", 0, 5)),
    "versions": (
        {"versions": {"python": "3.11.7", "jax": "0.12.0", "flax": "0.12.0"}},
        "versions",
        Line("jax", "0.10.2", "0.12.0"),
    ),
    "revision": (
        {"git_revision": "0123456789abcdef+changes"},
        "git revision",
        Line("git_revision", "0123456789abcdef", "0123456789abcdef+changes"),
    ),
    "mesh": ({"mesh": "fsdp 8"}, "mesh", Line("mesh", "one device on 1 cpu", "fsdp 8")),
    "a version that is gone": (
        {"versions": {"python": "3.11.7", "jax": "0.10.2"}},
        "versions",
        Line("flax", "0.12.0", ABSENT),
    ),
}


@pytest.mark.parametrize("case", CARD)
def test_a_line_of_the_card_is_named_and_nothing_else(pair, case, capsys):
    changes, title, line = CARD[case]
    change_card(pair[1], **changes)
    found = diff_runs(*pair)
    assert not found.same
    assert found.sections == {title: [line]}
    assert main(["diff", *map(str, pair)]) == 1
    assert str(line) in capsys.readouterr().out


def test_fingerprints_and_ledgers_are_compared_by_domain(pair):
    card = json.loads((pair[1] / "run_card.json").read_text())
    card["data"]["python"] = "other"
    card["ledger"]["python"]["new_tokens"] += 1
    (pair[1] / "run_card.json").write_text(json.dumps(card))
    found = diff_runs(*pair).sections
    assert [line.name for line in found["data fingerprints"]] == ["python"]
    (line,) = found["ledger"]
    assert line.name == "python.new_tokens" and line.b == line.a + 1


def test_the_configuration_is_compared_line_by_line_but_for_where_the_run_lies(pair, capsys):
    for run_dir, text in zip(
        pair,
        ("train.run_dir = 'a'\nDecoderConfig.num_layers = 4\n# note\nx.y = [1,\n    2]\n",
         "train.run_dir = 'b'\nDecoderConfig.num_layers = 4\nx.y = [1,\n    3]\nz.w = 1\n"),
        strict=True,
    ):  # fmt: skip
        change_card(run_dir, config=text)
    found = diff_runs(*pair)
    assert found.sections == {
        "configuration": [Line("x.y", "[1, 2]", "[1, 3]"), Line("z.w", ABSENT, "1")]
    }
    # Without a gin text on one side, the identity speaks for itself.
    change_card(pair[0], config=None)
    assert diff_runs(*pair).same


def test_a_setting_that_both_the_identity_and_the_gin_text_name_is_shown_once(pair):
    change_card(
        pair[1],
        identity={"seed": "0", "model.num_layers": "6"},
        config="train.seed = 0\ntrain.model = @DecoderConfig()\nDecoderConfig.num_layers = 6\n",
    )
    found = diff_runs(*pair)
    assert set(found.sections) == {"what decides the result", "configuration"}
    assert found.text().count("num_layers: 4 -> 6") == 1


def test_bindings_of_a_value_with_an_equals_sign():
    assert _bindings("a.b = 'x = 1'\n\nc/d.e = @f()\n") == {"a.b": "'x = 1'", "c/d.e": "@f()"}


def test_the_first_update_that_differs_is_named(pair):
    change_line(pair[1], "metrics", 17, lambda line: line.update(loss=9.5))
    change_line(pair[1], "metrics", 40, lambda line: line.update(loss=9.5))
    (line,) = diff_runs(*pair).sections["training"]
    assert line.name == "first difference, in update 17: loss" and line.b == 9.5


def test_held_out_losses_are_compared_where_both_were_evaluated(pair, capsys):
    def worse(line):
        line["domains"]["python"]["nats_per_token"] += 0.25

    change_line(pair[1], "evals", -1, worse)
    found = diff_runs(*pair)
    assert not found.same and not found.sections
    (score,) = [score for score in found.scores if score.a != score.b]
    assert (score.step, score.kind, score.domain) == (90, "stage_end", "python")
    assert score.difference == pytest.approx(0.25)
    assert main(["diff", *map(str, pair), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["same"] is False
    differing = [one for one in shown["heldout"] if one["difference"]]
    assert len(differing) == 1 and differing[0]["b"] == score.b
    assert "+0.2500" in found.text()


def test_a_branch_and_the_stages_end_at_one_step_are_two_evaluations(pair):
    line = json.loads((pair[0] / "evals.jsonl").read_text().splitlines()[-1])
    line |= {"kind": "branch", "branch_from": 80}
    with open(pair[0] / "evals.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    found = diff_runs(*pair)
    only = [Line("step 90 (branch, from step 80)", "evaluated", ABSENT)]
    assert found.sections == {"evaluations": only}
    assert all(score.a == score.b for score in found.scores)


def test_a_run_that_has_not_come_as_far_is_told_by_its_progress(runs):
    found = diff_runs(runs["plain"], runs["half"])
    assert found.sections["progress"] == [Line("updates done", 90, 47)]
    assert {line.b for line in found.sections["evaluations"]} == {ABSENT}
    assert max(score.step for score in found.scores) <= 47


def test_an_unlike_run_is_shown_with_its_losses(runs):
    found = diff_runs(runs["plain"], runs["replay"])
    text = found.text()
    assert "held-out loss, nats/token" in text and "stage end" in text
    assert "ledger" in text and "first difference, in update" in text


def test_no_run_is_one_line(pair, capsys):
    assert main(["diff", str(pair[0]), "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and len(error.strip().splitlines()) == 1
    assert main(["diff", str(pair[0]), str(pair[0])]) == 2
    assert "twice" in capsys.readouterr().err
