"""Whole runs at the smallest size: what is written, what resumes, what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.assembly import assemble
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.data import Data, Mixture, Replay, StageData
from lcl.evals import HeldOut
from lcl.models import DecoderConfig
from lcl.objectives import NextToken
from lcl.optim import AdamW, constant
from lcl.parallel import MeshConfig
from lcl.policies import Guard, NonFiniteError, read_left_out
from lcl.stages import Stage
from lcl.train import evaluate, train
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stores") / "byte"
    tiny.stores(path)
    return path


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> pathlib.Path:
    """The run that most tests look at."""
    return train(**tiny.settings(root, tmp_path_factory.mktemp("runs") / "finished"))


def lines(run_dir: pathlib.Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def digests(run_dir: pathlib.Path, step: int) -> dict:
    checkpointer = Checkpointer(run_dir, CheckpointPolicy(), read_only=True)
    return checkpointer._read_document(step)["leaves"]


def same_result(one: pathlib.Path, other: pathlib.Path, step: int = 12) -> None:
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (one / name).read_text() == (other / name).read_text(), f"{name} differs"
    assert digests(one, step) == digests(other, step)


# ---- what a run leaves behind -------------------------------------------------------------------


@pytest.mark.smoke
def test_every_step_is_logged_once_and_the_run_learns(finished):
    metrics = lines(finished)
    assert [line["step"] for line in metrics] == list(range(12))
    assert [line["stage"] for line in metrics] == ["alpha"] * 6 + ["beta"] * 6
    assert metrics[5]["loss"] < metrics[0]["loss"] - 1.0
    assert "replay_loss/alpha" in metrics[6] and "replay_loss/alpha" not in metrics[5]
    assert metrics[6]["learning_rate"] == pytest.approx(5e-3)


def test_the_loss_matrix_has_a_row_for_the_start_and_for_every_stage(finished):
    evals = lines(finished, "evals")
    assert [(line["step"], line["kind"]) for line in evals] == [
        (0, "start"),
        (6, "stage_end"),
        (12, "stage_end"),
    ]
    start, alpha, beta = (line["domains"] for line in evals)
    assert alpha["alpha"]["nats_per_token"] < start["alpha"]["nats_per_token"] - 1.0
    assert beta["beta"]["nats_per_token"] < alpha["beta"]["nats_per_token"] - 1.0


def test_the_run_card_says_what_the_run_is(finished):
    card = json.loads((finished / "run_card.json").read_text())
    assert card["stages"][1]["replay"] == {"fraction": 0.5, "mode": "substitute"}
    assert card["ledger"]["alpha"]["replayed_tokens"] > 0
    total = sum(v["new_tokens"] + v["replayed_tokens"] for v in card["ledger"].values())
    assert total == lines(finished)[-1]["tokens"]
    assert set(card["data"]) == {"alpha", "beta"}
    assert card["versions"]["jax"] == jax.__version__
    assert "infinite(peak=0.01" in card["identity"]["optimizer.schedule"]


@pytest.mark.smoke
def test_evaluate_repeats_the_last_row_of_the_matrix(root, finished):
    step, domains = evaluate(**tiny.settings(root, finished))
    assert step == 12
    assert domains == lines(finished, "evals")[-1]["domains"]


def test_a_finished_run_is_left_alone(root, finished):
    before = {p: p.read_bytes() for p in finished.glob("*.jsonl") if p.name != "timings.jsonl"}
    train(**tiny.settings(root, finished))
    assert before == {p: p.read_bytes() for p in before}


# ---- going on -----------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("steps", [4, 6, 8])  # within a stage, at the border, within the next
def test_a_run_that_stopped_anywhere_goes_on_bit_for_bit(root, finished, tmp_path, steps):
    """Megatron-Bridge#5257, marin#5319: one draw off after a resume; resume in the same folder."""
    run_dir = tmp_path / "run"
    train(**tiny.settings(root, run_dir))
    kept = run_dir / "checkpoints" / f"{steps:08d}"
    if not kept.exists():  # retention let it go: stop a run there instead
        run_dir = tmp_path / "short"
        policy = CheckpointPolicy(every_steps=steps, keep_last=20)
        train(**tiny.settings(root, run_dir, checkpoint=policy))
    for path in (run_dir / "checkpoints").iterdir():
        if path.name > f"{steps:08d}":
            path.rename(path.with_name(f"gone-{path.name}"))
    train(**tiny.settings(root, run_dir))
    same_result(run_dir, finished)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(root, finished, tmp_path, caplog):
    """MaxText#416: the last checkpoint was partial."""
    run_dir = tmp_path / "run"
    train(**tiny.settings(root, run_dir))
    newest = run_dir / "checkpoints" / "00000012"
    blob = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 0xFF
    blob.write_bytes(bytes(content))
    caplog.set_level("INFO")
    train(**tiny.settings(root, run_dir))
    assert "checkpoint 12 is damaged" in caplog.text
    assert "resuming at step 8" in caplog.text
    same_result(run_dir, finished)


def test_more_stages_may_be_appended_to_a_finished_run(root, finished, tmp_path):
    run_dir = tmp_path / "run"
    settings = tiny.settings(root, run_dir)
    train(**settings)
    more = (*settings["stages"], tiny.stage("third", steps=2))
    more = (*more[:2], dataclasses.replace(more[2], data=more[0].data))
    train(**tiny.settings(root, run_dir, stages=more))
    assert lines(run_dir)[:12] == lines(finished)
    assert [line["stage"] for line in lines(run_dir)[12:]] == ["third", "third"]


# ---- stages -------------------------------------------------------------------------------------


def test_a_stage_resets_its_moments_and_restarts_its_clock(root, tmp_path):
    """llm-foundry#194: the learning rate did not change at the new stage."""
    stages = (
        tiny.stage("alpha", steps=4),
        tiny.stage("beta", steps=4, moments="reset", clock="restart"),
    )
    run_dir = train(**tiny.settings(root, tmp_path / "run", stages=stages))
    rates = [line["learning_rate"] for line in lines(run_dir)]
    assert rates[4:] == rates[:4]


def test_a_transform_at_the_border_is_applied_once_even_when_killed_there(root, tmp_path):
    def doubled(params):
        return jax.tree.map(lambda leaf: 2.0 * leaf, params)

    stages = (tiny.stage("alpha", steps=4, on_exit=doubled), tiny.stage("beta", steps=2))
    whole = train(**tiny.settings(root, tmp_path / "whole", stages=stages))
    plain = (tiny.stage("alpha", steps=4), tiny.stage("beta", steps=2))
    other = train(**tiny.settings(root, tmp_path / "plain", stages=plain))
    assert lines(whole)[:4] == lines(other)[:4] and lines(whole)[4] != lines(other)[4]
    killed = train(**tiny.settings(root, tmp_path / "killed", stages=stages))
    (killed / "checkpoints" / "00000006").rename(killed / "checkpoints" / "gone")
    train(**tiny.settings(root, killed, stages=stages))
    same_result(killed, whole, step=6)


# ---- compilation and the host --------------------------------------------------------------------


def test_nothing_compiles_after_the_first_step_of_each_shape(root, tmp_path):
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    short = (tiny.stage("alpha", steps=3),)
    long = (tiny.stage("alpha", steps=30),)
    once = CheckpointPolicy(every_steps=None)
    counts = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # The first run also compiles what the process keeps (digests, the evaluation's sums).
        for index, stages in enumerate([short, short, long]):
            compiled.clear()
            run_dir = tmp_path / f"run{index}"
            train(**tiny.settings(root, run_dir, stages=stages, checkpoint=once))
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[1] == counts[2], f"27 more steps compiled {counts[2] - counts[1]} more programs"
    card = json.loads((run_dir / "run_card.json").read_text())
    assert sum(name.startswith("train step") for name in card["compiles"]) == 1


# ---- the guard -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Poisoned(NextToken):
    """NextToken whose loss is NaN for the one batch whose tokens sum to `poison`."""

    poison: int = 0

    def __call__(self, model, params, batch, num_sources):
        loss, aux = super().__call__(model, params, batch, num_sources)
        return jnp.where(jnp.sum(batch.tokens) == self.poison, jnp.nan, loss), aux


@pytest.fixture(scope="module")
def poisoned(root, tmp_path_factory):
    """An objective that is NaN at step 6, the first of the second stage."""
    settings = tiny.settings(root, tmp_path_factory.mktemp("poison"))
    for name in ("run_dir", "checkpoint", "logging"):
        settings.pop(name)
    batch = assemble(**settings).stream.batch(6)
    return Poisoned(poison=int(batch.tokens.sum()))


def test_a_nan_stops_the_run_and_names_the_rows(root, tmp_path, poisoned):
    with pytest.raises(NonFiniteError, match="step 6 is not finite") as error:
        train(**tiny.settings(root, tmp_path / "run", objective=poisoned))
    text = str(error.value)
    assert "beta[row" in text and "documents" in text and "rollback" in text
    assert "\n" not in text
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(6))


def test_a_rollback_leaves_the_step_out_and_resumes_exactly(root, tmp_path, poisoned):
    guard = Guard(on_nonfinite="rollback")
    settings = {"objective": poisoned, "guard": guard}
    run_dir = train(**tiny.settings(root, tmp_path / "run", **settings))
    assert read_left_out(run_dir) == {6}
    metrics = lines(run_dir)
    assert [line["step"] for line in metrics] == list(range(12))
    assert metrics[6]["left_out"] and np.isfinite(metrics[7]["loss"])
    other = train(**tiny.settings(root, tmp_path / "other", **settings))
    (other / "checkpoints" / "00000012").rename(other / "checkpoints" / "gone")
    train(**tiny.settings(root, other, **settings))
    same_result(other, run_dir)


def test_rollbacks_have_an_end(root, tmp_path):
    always = Guard(on_nonfinite="rollback", max_rollbacks=2)
    optimizer = AdamW(schedule=constant(rate=1e30))
    with pytest.raises(NonFiniteError):
        train(**tiny.settings(root, tmp_path / "run", guard=always, optimizer=optimizer))
    assert len(read_left_out(tmp_path / "run")) == 2


# ---- what is refused -----------------------------------------------------------------------------


def test_a_changed_configuration_is_refused_by_name_unless_allowed(root, tmp_path):
    run_dir = train(**tiny.settings(root, tmp_path / "run"))
    changed = tiny.settings(root, run_dir, seed=1)
    with pytest.raises(ValueError, match="seed: 0 -> 1") as error:
        train(**changed)
    assert "\n" not in str(error.value)
    train(**changed, allow_changes=True)


def test_changed_data_is_refused_by_its_fingerprint(root, tmp_path):
    run_dir = train(**tiny.settings(root, tmp_path / "run"))
    from lcl.data.testing import make_stores

    other = make_stores(tmp_path / "other", {"alpha": 40, "beta": 40}, seed=4)
    with pytest.raises(ValueError, match="data.alpha"):
        train(**tiny.settings(root, run_dir, data=other))


def tiny_data(**changes) -> StageData:
    return dataclasses.replace(tiny.stage("alpha").data, **changes)


REFUSED = {
    "unknown domain": (
        lambda: {"stages": (tiny.stage("alpa"),)},
        ("alpa", "alpha"),
    ),
    "zero weight": (
        lambda: {"stages": (Stage("a", tiny_data(mixture=Mixture({"alpha": 0.0})), steps=1),)},
        ("alpha",),
    ),
    "vocabulary": (
        lambda: {"model": dataclasses.replace(tiny.MODEL, vocab_size=128)},
        ("vocab_size=128", "258"),
    ),
    "row longer than the context": (
        lambda: {"stages": (Stage("a", tiny_data(sequence_length=128), steps=1),)},
        ("128", "context_length"),
    ),
    "mesh": (lambda: {"mesh": MeshConfig(fsdp=3)}, ("3", "1")),
    "no stages": (lambda: {"stages": ()}, ("stages",)),
    "two stages of one name": (
        lambda: {"stages": (tiny.stage("alpha"), tiny.stage("alpha"))},
        ("alpha",),
    ),
    "no stores": (lambda: {"data": Data("nowhere")}, ("nowhere", "lcl prepare")),
    "unknown held-out domain": (
        lambda: {"evaluation": HeldOut(domains=("gamma",), sequence_length=64)},
        ("gamma",),
    ),
    "replay that is no whole row": (
        lambda: {"stages": (Stage("a", tiny_data(replay=Replay(0.3)), steps=1),)},
        ("0.3",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_that_names_the_mend(root, tmp_path, case):
    changes, names = REFUSED[case]
    with pytest.raises(ValueError) as error:
        train(**tiny.settings(root, tmp_path / "run", **changes()))
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert name in text
    assert not (tmp_path / "run" / "checkpoints").exists(), "refused before anything is written"


def test_an_old_checkpoint_of_another_model_is_refused_and_kept(root, tmp_path):
    run_dir = train(**tiny.settings(root, tmp_path / "run"))
    wider = dataclasses.replace(tiny.MODEL, mlp_dim=96)
    before = digests(run_dir, 12)
    with pytest.raises(ValueError, match="another model") as error:
        train(**tiny.settings(root, run_dir, model=wider), allow_changes=True)
    assert "\n" not in str(error.value)
    assert digests(run_dir, 12) == before


def test_a_run_directory_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((ValueError, OSError)) as error:
        train(**tiny.settings(root, tmp_path / "file" / "run"))
    assert "\n" not in str(error.value)


# ---- frozen --------------------------------------------------------------------------------------


def test_the_arguments_of_train_are_frozen():
    """A feature is a new object, not a new argument: think twice before changing this list."""
    parameters = inspect.signature(train).parameters
    assert list(parameters) == [
        "run_dir",
        "seed",
        "model",
        "data",
        "stages",
        "optimizer",
        "objective",
        "mesh",
        "checkpoint",
        "evaluation",
        "logging",
        "guard",
        "allow_changes",
        "config_text",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_train_stays_a_story():
    source = pathlib.Path(inspect.getsourcefile(train)).read_text()
    assert len(source.splitlines()) < 500


def test_golden_loss_curve_of_a_two_layer_model(finished, request):
    """Same seed, refactor only => the same losses, up to what another CPU's rounding changes."""
    path = GOLDEN / "loss_curve.json"
    curve = {key: [line[key] for line in lines(finished)] for key in ("loss", "grad_norm")}
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(curve, indent=1) + "\n")
    for key, want in json.loads(path.read_text()).items():
        np.testing.assert_allclose(curve[key], want, rtol=1e-4, err_msg=key)


def test_golden_sharding_of_the_whole_state(golden):
    from lcl.parallel import rules
    from lcl.programs import boxed_state

    chain = AdamW(schedule=constant(rate=1e-3)).build()
    model = DecoderConfig(
        vocab_size=384, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(lambda key: boxed_state(model, chain, key), key)
    golden("sharding.json", rules.dumps(rules.sharding_dump(tree)))
