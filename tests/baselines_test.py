"""Baselines of a run's own configuration: the same data at once, or one after the other."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lcl.baselines import baseline, joint, naive
from lcl.data import LinearMixture, Mixture, Replay, StageData, Subset, TokenBudgets
from lcl.main import main
from lcl.models.rope import Rope
from lcl.objectives import Accumulate, AGem
from lcl.optim import AdamW, Reptile, constant
from lcl.stages import Stage
from tests import tiny


def stage(name, mixture, steps, batch_size=8, **changes):
    if isinstance(mixture, dict):
        mixture = Mixture(mixture)
    return Stage(name, StageData(mixture, 64, batch_size, **changes), steps=steps)


def test_joint_has_the_same_new_tokens_in_the_same_proportions():
    stages = [
        stage("a", {"en": 3.0, "fr": 1.0}, 20),
        stage("b", {"de": 1.0}, 10, replay=Replay(0.5, mode="substitute")),
        stage("c", {"fr": 1.0}, 5, replay=Replay(0.5, mode="add")),
    ]
    (one,) = joint(stages)
    # 160 rows, three quarters English; 40 German; 40 French.
    assert one.data.mixture.weights == pytest.approx({"en": 120 / 240, "fr": 80 / 240, "de": 1 / 6})
    assert one.num_steps * 8 == 240 and one.data.replay is None and one.name == "joint"


def test_joint_reads_curricula_and_budgets_to_the_row():
    line = LinearMixture([{"en": 1.0, "fr": 0.0}, {"en": 0.0, "fr": 1.0}])
    (one,) = joint(
        [stage("a", line, 10), stage("b", TokenBudgets({"de": 64 * 40, "en": None}), 10)]
    )
    weights = one.data.mixture.weights
    assert weights == pytest.approx({"en": 80 / 160, "fr": 40 / 160, "de": 40 / 160})


def test_joint_rounds_up_to_a_whole_step_and_keeps_a_rare_domain():
    (one,) = joint([stage("a", {"en": 1.0}, 3, batch_size=8), stage("b", {"fr": 1.0}, 1, 3)])
    assert one.num_steps == 4
    (one,) = joint([stage("a", {"en": 1.0}, 5000), stage("b", {"fr": 1.0}, 1)])
    assert one.data.mixture.block == 5001 and one.data.mixture.counts.tolist() == [5000, 1]


def test_naive_keeps_the_stages_and_drops_the_method():
    stages = [
        stage("a", {"en": 1.0}, 20),
        dataclasses.replace(
            stage("b", {"fr": 1.0}, 10, replay=Replay(0.5)), clock="restart", on_exit=dict
        ),
    ]
    first, second = naive(stages)
    assert first == stages[0]
    assert second == dataclasses.replace(
        stages[1], data=dataclasses.replace(stages[1].data, replay=None), on_exit=None
    )


@pytest.mark.parametrize(
    "other, named",
    [
        (lambda: Stage("b", StageData(Mixture({"fr": 1}), 128, 8), steps=1), "sequence_length"),
        (lambda: stage("b", {"fr": 1}, 1, packing="concat"), "'best_fit' and stage 'b' 'concat'"),
        (
            lambda: dataclasses.replace(stage("b", {"fr": 1}, 1), rope=Rope(theta=1e6)),
            "one rope",
        ),
        (
            lambda: stage("b", Subset(Mixture({"fr": 1}), "fr", epochs=2), 4),
            "reads a subset of 'fr'",
        ),
    ],
)
def test_stages_that_cannot_be_one_are_refused_in_one_line(other, named):
    with pytest.raises(ValueError, match=named) as error:
        joint([stage("a", {"en": 1.0}, 2), other()])
    assert "\n" not in str(error.value)


def test_a_baseline_has_no_method_around_optimizer_and_objective():
    inner = AdamW(schedule=constant(rate=1e-3))
    settings = {
        "stages": (stage("a", {"en": 1.0}, 2),),
        "optimizer": Reptile(inner=inner, every=5, step_size=0.5),
        "objective": AGem(objective=Accumulate(pieces=2)),  # how it is computed is no method
        "seed": 3,
    }
    found = baseline("naive", settings)
    assert found["optimizer"] is inner and found["seed"] == 3
    assert found["objective"] == Accumulate(pieces=2)
    with pytest.raises(ValueError, match="'jont' is unknown; use joint or naive"):
        baseline("jont", settings)


@pytest.mark.parametrize("name", ["joint", "naive"])
def test_the_command_line(name, tmp_path, capsys):
    """The baseline is an ordinary run: its own directory knows it, and goes on without the word."""
    root, run_dir = tmp_path / "stores", tmp_path / name
    tiny.stores(root)
    words = ["--gin_file=tests/tiny.gin", f"--gin.Data.root='{root}'", "--gin.Stage.steps=2"]
    assert main(["train", *words, f"--baseline={name}", f"--run_dir={run_dir}"]) == 0
    card = json.loads((run_dir / "run_card.json").read_text())
    stages = [(one["name"], one["num_steps"], one["replay"]) for one in card["stages"]]
    assert (
        stages
        == {
            "joint": [("joint", 4, None)],
            "naive": [("alpha", 2, None), ("beta", 2, None)],
        }[name]
    )
    if name == "joint":
        assert card["stages"][0]["domains"] == {"alpha": 0.625, "beta": 0.375}
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert main(["train", f"--run_dir={run_dir}"]) == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["train", *words, "--baseline=jont", "--run_dir=x"]) == 2
    assert "joint or naive" in capsys.readouterr().err
    # Its own configuration is one more: a baseline of a run's directory needs another directory.
    assert main(["train", f"--run_dir={run_dir}", f"--baseline={name}"]) == 2
    assert "--gin_file" in capsys.readouterr().err
