"""The same run on any mesh: identical batches, equal losses, and a resume from one onto another.

In child processes, since eight CPU devices can only be asked for before JAX starts.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

# Float32 sums over another number of devices are taken in another order. Stated bound: relative,
# over the 12 steps of the tiny run.
LOSS_BOUND = 2e-5

MESHES = {
    "1": {"data": 1},
    "8x1": {"data": 8},
    "2x4": {"data": 2, "fsdp": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "2x1x2x2": {"data": 2, "context": 2, "tensor": 2},
    "1x1x2": {"data": 1, "context": 2},
    "1x1x4": {"data": 1, "context": 4, "context_layout": "striped"},
    "2x1x4": {"data": 2, "context": 4, "context_layout": "contiguous"},
    "1x2x4": {"data": 1, "fsdp": 2, "context": 4},
}

CHILD = """
import hashlib, json, pathlib, sys
import jax
import numpy as np
from lcl import assembly
from lcl.parallel import MeshConfig
from lcl.train import train
from tests import tiny

root, run_dir, sizes = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
changes = {}
if sys.argv[4] == "decomposed":
    from lcl.data import Decomposition, Mixture, StageData
    from lcl.stages import Stage

    mixture = Mixture({"alpha": 1.0, "beta": 1.0}, block=8)
    decomposition = Decomposition(4, 6, cycles=2)
    data = StageData(mixture, 64, 8, decomposition=decomposition)
    changes = {"stages": (Stage("both", data, steps=12),)}
if sys.argv[4] == "accumulated":
    from lcl.objectives import Accumulate

    changes = {"objective": Accumulate(pieces=2)}
seen = []
original = assembly.Assembly.put


def put(self, batch, span):
    placed = original(self, batch, span)
    # A context axis may hold the cells of a row in another order: back to their own.
    fields = [np.asarray(jax.device_get(field)) for field in placed if field is not None]
    permuted = placed.row_index is not None
    assert permuted == (sizes.get("context", 1) > 1 and sizes.get("context_layout") != "contiguous")
    if permuted:
        row_index = fields.pop()
        assert (np.diff(row_index[0]) < 0).any()
        fields = [np.take_along_axis(x, np.argsort(row_index), axis=1) for x in fields]
    digest = hashlib.sha256()
    for field in fields:
        digest.update(field.tobytes())
    seen.append(digest.hexdigest())
    return placed


assembly.Assembly.put = put
train(**tiny.settings(root, run_dir, mesh=MeshConfig(**sizes), **changes))
print(json.dumps({"batches": seen, "devices": len(jax.devices())}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tests import tiny

    base = tmp_path_factory.mktemp("mesh")
    tiny.stores(base / "stores")
    return base


def losses(run_dir) -> np.ndarray:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["loss"], line["grad_norm"]] for line in lines])


@pytest.fixture(scope="module")
def done() -> dict[str, tuple[list[str], np.ndarray]]:
    """Batches and losses of the runs that have been made, by name."""
    return {}


@pytest.fixture
def run_on(base, run_python, done):
    """Runs (or continues) the tiny run called `name` on a mesh; a finished one is not repeated."""

    def run(mesh: str, name: str, kind: str = "packed") -> tuple[list[str], np.ndarray]:
        if name not in done:
            devices = int(np.prod([n for n in MESHES[mesh].values() if isinstance(n, int)]))
            words = (str(base / "stores"), str(base / name), json.dumps(MESHES[mesh]), kind)
            result = json.loads(run_python(CHILD, *words, devices=devices).splitlines()[-1])
            assert result["devices"] == devices
            done[name] = result["batches"], losses(base / name)
        return done[name]

    return run


def test_batches_are_identical_and_losses_equal_on_every_mesh(run_on):
    """Levanter#161, Speech#15339: another device count, another result."""
    batches, want = run_on("1", "on-1")
    assert len(batches) == 12 == len(set(batches))
    for mesh in MESHES:
        others, got = run_on(mesh, f"on-{mesh}")
        assert others == batches, f"mesh {mesh} saw other batches"
        np.testing.assert_allclose(got, want, rtol=LOSS_BOUND, err_msg=f"mesh {mesh}")
        print(f"mesh {mesh}: largest relative difference {np.max(np.abs(got / want - 1)):.1e}")


def test_decomposed_batches_are_identical_on_every_mesh(run_on):
    """Several shapes in one stage: each is split over the devices, and the loss stays."""
    batches, want = run_on("1", "decomposed-on-1", "decomposed")
    assert len(batches) == 12 == len(set(batches))
    for mesh in ("8x1", "2x4"):
        others, got = run_on(mesh, f"decomposed-on-{mesh}", "decomposed")
        assert others == batches, f"mesh {mesh} saw other batches"
        np.testing.assert_allclose(got, want, rtol=LOSS_BOUND, err_msg=f"mesh {mesh}")


def test_accumulated_gradients_are_the_whole_batch_s_on_a_mesh(run_on):
    """The loss of a batch in pieces, each spread over the devices, is the loss of the batch."""
    batches, want = run_on("1", "on-1")
    others, got = run_on("2x2x2", "accumulated-on-2x2x2", "accumulated")
    assert others == batches
    np.testing.assert_allclose(got, want, rtol=LOSS_BOUND)


@pytest.mark.parametrize("first, second", [("1", "2x4"), ("2x2x2", "1"), ("1x1x4", "1x1x2")])
def test_a_run_stopped_on_one_mesh_goes_on_on_another(base, run_on, first, second):
    """torchtitan, Bridge#5637: refused, or the loader's state silently lost."""
    batches, want = run_on("1", "on-1")
    run_on(first, f"on-{first}")
    name = f"from-{first}-to-{second}"
    shutil.copytree(base / f"on-{first}", base / name)
    shutil.rmtree(base / name / "checkpoints" / "00000012")
    tail, got = run_on(second, name)
    assert tail == batches[8:], "the resumed run saw other batches"
    np.testing.assert_allclose(got, want, rtol=LOSS_BOUND, err_msg=name)


REFUSED = """
import dataclasses, json, pathlib, sys
from lcl.data import Mixture, StageData
from lcl.evals import HeldOut
from lcl.objectives import Accumulate
from lcl.parallel import MeshConfig
from lcl.stages import Stage
from lcl.train import train
from tests import tiny


def rows(length):
    data = StageData(Mixture({"alpha": 1.0}), length, 8)
    return {"stages": (Stage("long", data, steps=1),), "evaluation": held_out(64)}


def held_out(length):
    return HeldOut(rows_per_domain=8, sequence_length=length, batch_size=8)


def model(**changes):
    return {"model": dataclasses.replace(tiny.MODEL, **changes)}


CASES = {
    "row": ({"data": 2, "context": 4}, rows(62)),
    "chunks": ({"data": 2, "context": 4}, rows(60)),
    "evaluation": ({"data": 2, "context": 4}, {"evaluation": held_out(60)}),
    "ulysses": ({"data": 2, "context": 4}, model(attention="ulysses", num_heads=2)),
    "blocks": ({"data": 8}, model(attention="splash")),
    "layout": ({"data": 8, "context_layout": "zig"}, {}),
    "pieces": ({"data": 2, "fsdp": 2, "context": 2}, {"objective": Accumulate(3)}),
}
said = {}
for name, (mesh, changes) in CASES.items():
    try:
        changes = {"mesh": MeshConfig(**mesh)} | changes
        train(**tiny.settings(pathlib.Path(sys.argv[1]), sys.argv[2], **changes))
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_what_a_context_mesh_cannot_split_is_refused_when_the_config_is_built(base, run_python):
    words = (str(base / "stores"), str(base / "refused"))
    said = json.loads(run_python(REFUSED, *words, devices=8).splitlines()[-1])
    for name, parts in {
        "row": ("stage 'long'", "62", "context", "60 or 64"),
        "chunks": ("stage 'long'", "60", "2 x context = 8", "64"),
        "evaluation": ("the evaluation", "60", "64"),
        "ulysses": ("ulysses", "2 heads", "context"),
        "blocks": ("splash", "TPU", "blockwise"),
        "layout": ("context_layout", "'zig'", "zigzag"),
        "pieces": ("pieces=3", "8 rows", "1, 2 pieces"),
    }.items():
        assert name in said, f"{name} was not refused"
        assert "\n" not in said[name]
        for part in parts:
            assert part in said[name], said[name]
    assert not (base / "refused").exists()
