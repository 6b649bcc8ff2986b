"""Trunk and branch: the copy is annealed by the formula, and the trunk never knows of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import lcl.train
from lcl.assembly import assemble
from lcl.branches import anneal, annealed, branch
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.data import Replay
from lcl.evals import Branches, HeldOut, StageClock
from lcl.main import main
from lcl.models import Decoder
from lcl.objectives import NextToken
from lcl.optim import AdamW, Reptile, infinite, wsd
from lcl.optim.adamw import decay_mask
from lcl.train import evaluate, train
from tests import tiny

ANNEAL = 3
CONSTANT, FINAL = 5e-3, 1e-4  # tiny's schedule: the constant phase begins at step 6
STAGES = (
    tiny.stage("alpha", steps=10),
    tiny.stage("beta", steps=6, replay=Replay(0.5, mode="substitute")),
)
KEEP = CheckpointPolicy(every_steps=4, keep_last=50)


BRANCHES = Branches(ANNEAL)


def settings(root, run_dir, branches: Branches | None = BRANCHES, **changes):
    evaluation = HeldOut(
        rows_per_domain=8, sequence_length=64, batch_size=8, every_steps=4, branches=branches
    )
    changes = {"stages": STAGES, "evaluation": evaluation, "checkpoint": KEEP} | changes
    return tiny.settings(root, run_dir, **changes)


def assembled(root, **changes):
    given = settings(root, "unused", **changes)
    for name in ("run_dir", "checkpoint", "logging"):
        given.pop(name)
    return assemble(**given)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stores") / "byte"
    tiny.stores(path)
    return path


@pytest.fixture(scope="module")
def trunk(root, tmp_path_factory) -> pathlib.Path:
    """The run that has no branches."""
    run_dir = tmp_path_factory.mktemp("runs") / "trunk"
    return train(**settings(root, run_dir, branches=None))


@pytest.fixture(scope="module")
def branched(root, tmp_path_factory) -> pathlib.Path:
    """The same run with a branch at each stage's end."""
    return train(**settings(root, tmp_path_factory.mktemp("runs") / "branched"))


def lines(run_dir: pathlib.Path, name: str = "evals") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def of_branches(run_dir: pathlib.Path) -> list[dict]:
    return [line for line in lines(run_dir) if line["kind"] == "branch"]


def digests(run_dir: pathlib.Path, step: int) -> dict:
    return Checkpointer(run_dir, KEEP, read_only=True)._read_document(step)["leaves"]


def nats(line: dict) -> dict[str, float]:
    return {domain: scores["nats_per_token"] for domain, scores in line["domains"].items()}


# ---- in the loop --------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_trunk_is_bit_identical_with_and_without_branches(trunk, branched):
    assert digests(branched, 16) == digests(trunk, 16)
    assert digests(branched, 8) == digests(trunk, 8)
    assert (branched / "metrics.jsonl").read_bytes() == (trunk / "metrics.jsonl").read_bytes()
    assert [line for line in lines(branched) if line["kind"] != "branch"] == lines(trunk)


def test_a_branch_has_one_line_written_where_it_leaves(branched):
    found = of_branches(branched)
    keys = ("branch_from", "step", "stage_index", "stage")
    assert [[line[key] for key in keys] for line in found] == [
        [7, 10, 0, "alpha"],
        [13, 16, 1, "beta"],
    ]
    at = [line.get("branch_from", line["step"]) for line in lines(branched)]
    assert at == sorted(at)


def test_the_branch_is_what_one_would_get_by_hand(root, trunk, branched):
    """By plain Optax from the checkpoint of the trunk that never branched; rates by the formula."""
    run = assembled(root, branches=None)
    every = CheckpointPolicy(every_steps=1, keep_last=50)
    short = dataclasses.replace(STAGES[0], steps=7)
    seven = train(**settings(root, trunk.parent / "seven", None, stages=(short,), checkpoint=every))
    with Checkpointer(seven, every, read_only=True) as checkpoints:
        state = checkpoints.restore(run.abstract_state, 7).state
    model = Decoder(run.model)
    rates = [CONSTANT * (FINAL / CONSTANT) ** (n / ANNEAL) for n in range(ANNEAL)]

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda p: NextToken()(model, p, batch, 4)[0])(params)

    adam, params = state.opt_state["adam"], state.params
    for n, rate in enumerate(rates):
        clipped, _ = optax.clip_by_global_norm(1.0).update(
            gradient(params, run.stream.batch(7 + n)), optax.EmptyState()
        )
        updates, adam = optax.scale_by_adam(0.9, 0.95, 1e-8).update(clipped, adam)
        params = jax.tree.map(
            lambda p, u, decays, rate=rate: p - rate * (u + 0.1 * decays * p),
            params,
            updates,
            decay_mask(params),
        )
    side = annealed(run, ANNEAL)
    seen = []
    got = anneal(
        side, 7, state, ANNEAL, record=lambda step, span, m: seen.append(float(m["learning_rate"]))
    )
    assert seen == pytest.approx(rates, rel=1e-6)
    for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(got.params), strict=True):
        assert jnp.allclose(mine, theirs, atol=2e-5)
    assert int(got.opt_state["lr"].count) == ANNEAL and int(got.step) == 10
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the trunk was donated"
    heldout = run.heldout_batches(HeldOut(rows_per_domain=8, sequence_length=64, batch_size=8))
    by_hand = lcl.train.evaluate_heldout(run.eval_step(run.spans[0]), params, heldout)
    want = {domain: scores["nats_per_token"] for domain, scores in by_hand.items()}
    assert nats(of_branches(branched)[0]) == pytest.approx(want, rel=1e-4)


def test_a_branch_may_leave_every_few_steps_and_compiles_once(root, tmp_path, branched):
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    counts = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for every in (7, 2):
            compiled.clear()
            branches = Branches(ANNEAL, every_steps=every, stage_ends=False)
            run_dir = train(**settings(root, tmp_path / f"every{every}", branches))
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Within the constant phase (from 6), with three steps of the stage left.
    assert [line["branch_from"] for line in of_branches(run_dir)] == [6, 10, 12]
    assert counts[0] == counts[1], "each branch compiled something"
    assert digests(run_dir, 16) == digests(branched, 16)


def test_a_step_that_the_run_leaves_out_is_left_out_of_the_branch(root, trunk):
    run = assembled(root)
    side = annealed(run, ANNEAL)
    with Checkpointer(trunk, KEEP, read_only=True) as checkpoints:
        state = checkpoints.restore(run.abstract_state, 12).state
    seen = []
    got = anneal(
        side,
        12,
        state,
        ANNEAL,
        left_out=frozenset({13}),
        record=lambda step, span, metrics: seen.append(metrics and metrics["learning_rate"]),
    )
    assert seen[1] is None and int(got.step) == 15
    assert float(seen[2]) == pytest.approx(CONSTANT * (FINAL / CONSTANT) ** (2 / 3), rel=1e-6)


@pytest.mark.parametrize("when", ["during", "after"])
def test_killed_during_or_after_a_branch_the_run_ends_with_the_same_bits(
    root, tmp_path, branched, monkeypatch, when
):
    """The blow falls once the second branch is trained, or two steps after it was written."""
    run_dir = tmp_path / "run"

    class Killed(BaseException):
        pass

    real_evaluate, real_add, count = lcl.train.evaluate_branch, lcl.train.Recorder.add, []

    def evaluate_branch(*arguments):
        count.append(1)
        if len(count) == 2:
            raise Killed
        return real_evaluate(*arguments)

    def add(self, step, *arguments):
        if step == 14:
            raise Killed
        real_add(self, step, *arguments)

    with monkeypatch.context() as patch:
        if when == "during":
            patch.setattr(lcl.train, "evaluate_branch", evaluate_branch)
        else:
            patch.setattr(lcl.train.Recorder, "add", add)
        with pytest.raises(Killed):
            train(**settings(root, run_dir))
    assert len(of_branches(run_dir)) == {"during": 1, "after": 2}[when]
    train(**settings(root, run_dir))
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (run_dir / name).read_bytes() == (branched / name).read_bytes()
    assert digests(run_dir, 16) == digests(branched, 16)


def test_a_run_that_began_before_there_were_branches_is_still_the_same_run(root, trunk, tmp_path):
    card = json.loads((trunk / "run_card.json").read_text())
    assert not [key for key in card["identity"] if "branches" in key]
    with pytest.raises(ValueError, match="evaluation.branches.anneal_steps: absent -> 3"):
        train(**settings(root, trunk))


# ---- where they begin ---------------------------------------------------------------------------

CLOCKS = [StageClock("en", 0, 100), StageClock("fr", 100, 160)]
RESTARTED = [StageClock("en", 0, 100), StageClock("fr", 100, 160, clock_zero=100)]


def test_branches_begin_where_the_constant_phase_and_the_stage_allow():
    assert Branches(20).begin(CLOCKS, constant_from=30) == (80, 140)
    assert Branches(20, 50, False).begin(CLOCKS, constant_from=0) == (50, 100)
    assert Branches(20, 50, False).begin(RESTARTED, constant_from=1) == (50,)
    assert Branches(20, 10, False).begin(RESTARTED, constant_from=30) == (
        *range(30, 90, 10),
        *(130, 140),
    )
    assert Branches(20, 30, False).begin(CLOCKS, constant_from=0, constant_until=60) == (30, 60)


REFUSED = {
    "longer than the stage": (lambda: Branches(61).begin(CLOCKS, constant_from=0), "'fr'", "60"),
    "before the constant phase": (
        lambda: Branches(80).begin(CLOCKS[:1], constant_from=30),
        "step 20",
        "anneal over 70 steps or fewer",
    ),
    "before it, since the clock restarted": (
        lambda: Branches(40).begin(RESTARTED, constant_from=30),
        "step 130 (its clock restarted at step 100)",
        "anneal over 30 steps or fewer",
    ),
    "after it": (
        lambda: Branches(20).begin(CLOCKS, constant_from=0, constant_until=100),
        "ends at step 100",
        "no anneal of its own",
    ),
    "never": (
        lambda: Branches(20, 90, False).begin(CLOCKS, constant_from=0),
        "every_steps=90",
        "more often",
    ),
    "none at all": (lambda: Branches(20, stage_ends=False), "stage_ends", "HeldOut.branches=None"),
    "no steps": (lambda: Branches(0), "anneal_steps=0", "at least 1"),
    "a fraction of a step": (lambda: Branches(2, 1.5), "every_steps=1.5", "whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_branch_that_cannot_be_is_refused_in_one_line(case):
    build, named, mend = REFUSED[case]
    with pytest.raises(ValueError) as error:
        build()
    text = str(error.value)
    assert named in text and mend in text and "\n" not in text


def schedule_of(**changes) -> AdamW:
    wanted = {"peak": 1e-2, "constant": 5e-3, "final": 1e-4, "warmup_steps": 2, "cooldown_steps": 4}
    return AdamW(schedule=infinite(**wanted | changes))


@pytest.mark.parametrize(
    "optimizer, named",
    [
        (schedule_of(cooldown_steps=20), "before the constant phase"),
        (schedule_of(anneal_start=8, anneal_steps=4), "after the constant phase"),
        (AdamW(schedule=lcl.optim.cosine(peak=1e-2, final=1e-3, warmup_steps=2, total_steps=16)),
         "constant phase"),
    ],
)  # fmt: skip
def test_a_run_is_refused_when_it_is_configured(root, tmp_path, optimizer, named):
    with pytest.raises(ValueError, match=named) as error:
        train(**settings(root, tmp_path / "run", optimizer=optimizer))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# ---- by command ---------------------------------------------------------------------------------


def tree(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "branches" not in path.relative_to(folder).parts
    }


@pytest.mark.smoke
def test_an_old_checkpoint_branches_into_a_run_directory_of_its_own(root, branched):
    before = tree(branched)
    out = branch(at=7, **settings(root, branched))
    assert out == branched / "branches" / "00000007-3"
    assert tree(branched) == before, "the run's own files were touched"
    start, end = lines(out)
    assert (start["kind"], start["step"], end["kind"], end["step"]) == ("start", 7, "stage_end", 10)
    assert end["domains"] == of_branches(branched)[0]["domains"]
    rates = [line["learning_rate"] for line in lines(out, "metrics")]
    want = [CONSTANT * (FINAL / CONSTANT) ** (n / ANNEAL) for n in range(ANNEAL)]
    assert rates == pytest.approx(want, rel=1e-6)
    assert [line["step"] for line in lines(out, "metrics")] == [7, 8, 9]
    card = json.loads((out / "run_card.json").read_text())
    own = card["identity"]["branch"]
    assert (own["parent"], own["from_step"], own["anneal_steps"]) == ("branched", 7, 3)
    assert [(one["name"], one["first_step"], one["num_steps"]) for one in card["stages"]] == [
        ("alpha", 7, 3)
    ]
    # Its checkpoint is one of the run's model: evaluated again, it gives the same numbers.
    step, domains = evaluate(**settings(root, out))
    assert step == 10 and domains == end["domains"]
    found = tree(out)
    assert branch(at=7, **settings(root, branched)) == out and tree(out) == found
    with pytest.raises(ValueError, match="another configuration"):
        train(**settings(root, out))


def test_a_branch_from_a_border_belongs_to_the_stage_that_begins_there(root, tmp_path):
    stages = (STAGES[0], dataclasses.replace(STAGES[1], moments="reset", steps=4))
    run_dir = train(**settings(root, tmp_path / "run", Branches(4, 2), stages=stages))
    ten = next(line for line in of_branches(run_dir) if line["branch_from"] == 10)
    assert (ten["step"], ten["stage"]) == (14, "beta")
    out = branch(at=10, anneal_steps=4, **settings(root, run_dir, Branches(4, 2), stages=stages))
    assert lines(out)[-1]["domains"] == ten["domains"]


@pytest.mark.parametrize(
    "at, anneal_steps, named",
    [
        (4, 3, "before the constant phase, which begins at step 6"),
        (8, 3, "anneal over 2 steps or fewer"),
        (16, 3, "no stage of the run trains step 16"),
        (9, 1, "9"),
        (8, 0, "must be 1 or more"),
    ],
)
def test_a_branch_by_command_is_refused_in_one_line(root, trunk, at, anneal_steps, named):
    with pytest.raises(ValueError, match=named) as error:
        branch(at=at, anneal_steps=anneal_steps, **settings(root, trunk, None))
    assert "\n" not in str(error.value)
    assert not (trunk / "branches").exists()


def test_the_length_must_come_from_somewhere(root, trunk):
    with pytest.raises(ValueError, match="--anneal_steps N"):
        branch(at=8, **settings(root, trunk, None))


def test_wsd_branches_too(root, tmp_path):
    """MiniCPM's schedule, whose stable phase is its peak."""
    optimizer = AdamW(schedule=wsd(peak=CONSTANT, final=FINAL, warmup_steps=2))
    run = assembled(root, optimizer=optimizer)
    side = annealed(run, ANNEAL)
    rates = [float(side.optimizer.schedule(n)) for n in range(ANNEAL + 1)]
    want = [CONSTANT * (FINAL / CONSTANT) ** (n / ANNEAL) for n in range(ANNEAL + 1)]
    assert rates == pytest.approx(want, rel=1e-6)


def test_the_command_line(root, tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["train", f"--run_dir={run_dir}"]
    given = [f"--gin.Data.root='{root}'", "--gin.CheckpointPolicy.keep_last=9"]
    given += ["--gin.Stage.steps=8", "--gin.infinite.cooldown_steps=1"]  # constant from step 6 on
    given += ["--gin.beta/Stage.clock='continue'"]
    assert main([*words, "--gin_file=tests/tiny.gin", *given]) == 0
    before = tree(run_dir)
    mistakes = {
        ("--branch-at=4", "--anneal_steps=2"): "constant phase, which begins at step 6",
        ("--branch-at=8", "--anneal_steps=9"): "anneal over 8 steps or fewer",
        ("--branch-at=9", "--anneal_steps=2"): "4, 8, 12, 16",
        ("--branch-at=12", "--anneal_steps=2", "--gin.train.seed=1"): "seed: 0 -> 1",
        ("--branch-at=12",): "--anneal_steps N",
        ("--anneal_steps=2",): "--branch-at",
    }
    for more, named in mistakes.items():
        capsys.readouterr()
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.strip().splitlines()) == 1
    assert main(["train", "--branch-at=12"]) == 2
    assert "--run_dir" in capsys.readouterr().err
    assert main([*words, "--branch-at=12", "--anneal_steps=3"]) == 0
    assert "alpha" in capsys.readouterr().out
    assert tree(run_dir) == before
    out = run_dir / "branches" / "00000012-3"
    assert main(["evaluate", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"step": 15, "domains": lines(out)[-1]["domains"]}
    assert main(["info", str(out)]) == 0


def test_a_method_with_slow_weights_branches_and_its_trunk_does_not_move(root, tmp_path):
    """Reptile: the copy takes the slow weights along and syncs at its end; the trunk's stay."""
    reptile = Reptile(inner=schedule_of(), every=4, step_size=0.5)
    stages = (STAGES[0],)
    common = {"optimizer": reptile, "stages": stages}
    plain = train(**settings(root, tmp_path / "plain", None, **common))
    run_dir = train(**settings(root, tmp_path / "branched", **common))
    assert digests(run_dir, 10) == digests(plain, 10)
    (line,) = of_branches(run_dir)
    run = assembled(root, branches=None, **common)
    with Checkpointer(run_dir, KEEP, read_only=True) as checkpoints:
        state = checkpoints.restore(run.abstract_state, 7).state
    got = anneal(annealed(run, ANNEAL), 7, state, ANNEAL)
    slow = got.opt_state.slow
    for mine, theirs in zip(jax.tree.leaves(got.params), jax.tree.leaves(slow), strict=True):
        assert jnp.array_equal(mine, theirs), "the branch's end is no sync"
    heldout = run.heldout_batches(HeldOut(rows_per_domain=8, sequence_length=64, batch_size=8))
    again = lcl.train.evaluate_heldout(run.eval_step(run.spans[0]), got.params, heldout)
    assert again == line["domains"]
