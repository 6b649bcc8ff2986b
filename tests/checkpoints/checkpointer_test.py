"""Saving and restoring: everything comes back, nothing damaged does, nothing is lost on the way."""

from __future__ import annotations

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from lcl.checkpoints import Checkpointer, CheckpointError, CheckpointPolicy, state_digest
from lcl.checkpoints import checkpointer as module


def make_state(seed=0, dim=4):
    """A small state of every kind of leaf that a run keeps."""
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"up": jnp.asarray(rng.normal(size=(2, dim, 300)), jnp.float32)},
        "scale": jnp.asarray(rng.normal(size=dim), jnp.bfloat16),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt": opt,
        "mask": jnp.array([True, False]),
        "minus": jnp.float32(-0.0),
        "key": jax.random.key(seed),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and state_digest(a) == state_digest(b)


def names(run_dir):
    return sorted(path.name for path in (pathlib.Path(run_dir) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 10 and 20, to be copied and damaged."""
    run_dir = tmp_path_factory.mktemp("saved")
    with Checkpointer(run_dir) as checkpointer:
        for step in (10, 20):
            checkpointer.save(
                step, make_state(step), {"tokens": step * 100, "at": [1, {"a": None}]}
            )
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def newest_files(run_dir):
    newest = pathlib.Path(run_dir) / "checkpoints" / "00000020"
    return sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())


def largest_file(run_dir):
    """The one with the arrays' data."""
    newest = pathlib.Path(run_dir) / "checkpoints" / "00000020"
    return max(newest_files(run_dir), key=lambda file: (newest / file).stat().st_size)


# Round trips ---------------------------------------------------------------------------------


def test_everything_comes_back(saved):
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.steps() == [10, 20]
        restored = checkpointer.restore_latest(abstract(make_state()))
        assert checkpointer.metadata(10) == {"tokens": 1000, "at": [1, {"a": None}]}
    assert restored.step == 20
    assert restored.metadata == {"tokens": 2000, "at": [1, {"a": None}]}
    assert same(restored.state, make_state(20))
    assert isinstance(restored.state["opt"], tuple)


def test_an_empty_directory_has_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.restore_latest(abstract(make_state())) is None
        with pytest.raises(CheckpointError, match="no checkpoint in .*: have none"):
            checkpointer.restore(abstract(make_state()))


def test_a_relative_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/a") as checkpointer:
        checkpointer.save(1, make_state(1), {})
        monkeypatch.chdir("/")  # nor does it follow a process that moves
        assert checkpointer.restore_latest(abstract(make_state())).step == 1
    assert names(tmp_path / "runs/a") == ["00000001"]


def test_any_step_and_a_part_of_it(saved):
    part = {"params": abstract(make_state())["params"]}
    with Checkpointer(saved, read_only=True) as checkpointer:
        assert same(checkpointer.restore(abstract(make_state()), 10).state, make_state(10))
        warm = checkpointer.restore(part, 10, partial=True)
        assert same(warm.state, {"params": make_state(10)["params"]})
        assert checkpointer.restore(part, partial=True).step == 20
        with pytest.raises(CheckpointError, match="no checkpoint of step 15 in .*: have 10, 20"):
            checkpointer.restore(abstract(make_state()), 15)
        assert checkpointer.restore_latest(abstract(make_state()), before=20).step == 10


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The loop overwrites the state's buffers while the files are written."""
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = bump({f"w{i}": jnp.zeros((256, 256)) for i in range(8)})
    with Checkpointer(tmp_path, CheckpointPolicy(keep_last=9)) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, state, {})
            for _ in range(3):
                state = bump(state)
        for step in range(1, 5):
            back = checkpointer.restore(abstract(state), step).state  # its digest is verified too
            assert float(back["w7"].max()) == float(back["w0"].min()) == 3 * step - 2


def test_resume_goes_on_saving_where_it_loaded(tmp_path):
    """marin#5319: resume failed only when the load path was the save path."""
    for start in (0, 3, 6):
        with Checkpointer(tmp_path, CheckpointPolicy(keep_last=2)) as checkpointer:
            restored = checkpointer.restore_latest(abstract(make_state()))
            assert (restored.step if restored else 0) == start
            for step in range(start + 1, start + 4):
                checkpointer.save(step, make_state(step), {})
    assert names(tmp_path) == ["00000008", "00000009"]


# Retention, repeated and abandoned steps -----------------------------------------------------


def test_the_newest_and_every_nth_are_kept(tmp_path):
    with Checkpointer(tmp_path, CheckpointPolicy(keep_last=2, keep_every=4)) as checkpointer:
        for step in range(1, 8):
            checkpointer.save(step, {"w": jnp.full(2, step)}, {})
    assert names(tmp_path) == ["00000004", "00000006", "00000007"]


def test_when_a_checkpoint_is_due():
    policy = CheckpointPolicy(every_steps=10)
    assert [step for step in range(31) if policy.due(step)] == [10, 20, 30]
    assert not CheckpointPolicy(every_steps=None).due(10)


@pytest.mark.parametrize("name", ["every_steps", "keep_last", "keep_every"])
def test_a_policy_that_keeps_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"CheckpointPolicy.{name} = 0: give a positive number"):
        CheckpointPolicy(**{name: 0})


def test_the_same_step_with_the_same_bits_is_left_alone(run_dir):
    with Checkpointer(run_dir) as checkpointer:
        assert checkpointer.save(20, make_state(20), {"other": 1}) is False
        assert checkpointer.metadata(20)["tokens"] == 2000


def test_the_same_step_with_other_bits_is_replaced(run_dir):
    with Checkpointer(run_dir) as checkpointer:
        assert checkpointer.save(20, make_state(7), {"tokens": 7}) is True
        assert same(checkpointer.restore_latest(abstract(make_state())).state, make_state(7))
    assert names(run_dir) == ["00000010", "00000020"]


def test_a_replacement_that_was_killed_leaves_the_old_one(run_dir):
    """Between the old one's renaming and the new one's completion the old one is not lost."""
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "00000020").rename(checkpoints / "00000020.replaced")
    (checkpoints / "00000020.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(run_dir) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state())).step == 20
    assert names(run_dir) == ["00000010", "00000020"]


def test_later_steps_of_a_rolled_back_line_are_set_aside(run_dir):
    lines = []
    with Checkpointer(run_dir, log=lines.append) as checkpointer:
        assert checkpointer.restore_latest(abstract(make_state()), before=20).step == 10
        checkpointer.save(15, make_state(15), {})
    assert names(run_dir) == ["00000010", "00000015", "00000020.abandoned"]
    assert lines == ["checkpoint 20 is of an abandoned line of steps: set aside"]


def test_what_a_killed_writer_left_is_swept_up_but_never_by_a_reader(run_dir):
    checkpoints = run_dir / "checkpoints"
    for name in ("00000030.orbax-checkpoint-tmp", "00000005.deleted"):
        (checkpoints / name).mkdir()
    with Checkpointer(run_dir, read_only=True) as reader:
        assert reader.steps() == [10, 20]
    assert len(names(run_dir)) == 4
    with Checkpointer(run_dir) as writer:
        assert writer.steps() == [10, 20]
    assert names(run_dir) == ["00000010", "00000020"]


# Damage --------------------------------------------------------------------------------------


def restore_logged(run_dir, **kwargs):
    lines: list[str] = []
    with Checkpointer(run_dir, log=lines.append, **kwargs) as checkpointer:
        return checkpointer.restore_latest(abstract(make_state())), lines


# TensorStore may still answer a read that was given up: "Event loop is closed", harmless.
late_answers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@late_answers
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied"])
def test_a_torn_newest_falls_back_and_says_so(saved, tmp_path, damage):
    """Whatever file is hit: the right bits of 20, or 10 and a line about it; never wrong bits."""
    fell_back = set()
    for number, file in enumerate(newest_files(saved)):
        run_dir = tmp_path / str(number)
        shutil.copytree(saved, run_dir)
        path = run_dir / "checkpoints" / "00000020" / file
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 * (damage != "emptied")])
        restored, lines = restore_logged(run_dir)
        assert same(restored.state, make_state(restored.step)), file
        if restored.step == 10:
            fell_back.add(file)
            assert lines[0].startswith("checkpoint 20 is damaged ("), file
            assert lines[1] == "set aside as 00000020.corrupt"
            assert names(run_dir) == ["00000010", "00000020.corrupt"]
    needed = {
        largest_file(saved),
        *map(pathlib.Path, ["metadata/metadata", "state/manifest.ocdbt"]),
    }
    assert needed <= fell_back  # others (commit marks, sharding notes) are not needed to read


@late_answers
def test_a_flipped_byte_falls_back(saved, tmp_path):
    """Every file of the newest, a byte at three places: the right bits, or the one before."""
    rng = np.random.default_rng(0)
    fell_back = set()
    for number, file in enumerate(newest_files(saved)):
        run_dir = tmp_path / str(number)
        shutil.copytree(saved, run_dir)
        path = run_dir / "checkpoints" / "00000020" / file
        data = bytearray(path.read_bytes())
        if not data:
            continue
        for place in rng.integers(0, len(data), 3):
            data[place] ^= 0x10
        path.write_bytes(data)
        restored, _ = restore_logged(run_dir)
        assert same(restored.state, make_state(restored.step)), file
        if restored.step == 10:
            fell_back.add(file)
    assert {largest_file(saved), pathlib.Path("metadata/metadata")} <= fell_back


def test_bits_that_read_back_well_but_are_others_are_noticed(tmp_path, monkeypatch):
    """Rot before the files' own checksums were made: only our digest can see it."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        wrong = make_state(2)
        wrong["params"]["layers"]["up"] = wrong["params"]["layers"]["up"].at[1, 2, 3].add(1e-6)
        real = module.state_digest
        monkeypatch.setattr(module, "state_digest", lambda state: real(make_state(2)))
        checkpointer.save(2, wrong, {})
    monkeypatch.undo()
    restored, lines = restore_logged(tmp_path)
    assert restored.step == 1
    assert "params/layers/up does not have the bits that were saved" in lines[0]


def test_two_bad_ones_in_a_row_and_a_second_of_the_same_name(run_dir):
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "00000020.corrupt").mkdir()
    with Checkpointer(run_dir, CheckpointPolicy(keep_last=9)) as checkpointer:
        checkpointer.save(30, make_state(30), {})
    for step in ("00000020", "00000030"):
        shutil.rmtree(checkpoints / step / "state")
    restored, lines = restore_logged(run_dir)
    assert restored.step == 10
    assert names(run_dir) == [
        "00000010", "00000020.corrupt", "00000020.corrupt-2", "00000030.corrupt",
    ]  # fmt: skip
    assert len(lines) == 4


def test_a_reader_falls_back_too_but_moves_nothing(run_dir):
    shutil.rmtree(run_dir / "checkpoints" / "00000020" / "state")
    restored, lines = restore_logged(run_dir, read_only=True)
    assert restored.step == 10 and len(lines) == 1
    assert names(run_dir) == ["00000010", "00000020"]
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        with pytest.raises(CheckpointError, match="checkpoint 20 in .* is damaged"):
            checkpointer.restore(abstract(make_state()), 20)


def test_when_none_reads_back_nothing_is_thrown_away(run_dir):
    """A silent start from step 0 would overwrite what might still be rescued."""
    for step in ("00000010", "00000020"):
        shutil.rmtree(run_dir / "checkpoints" / step / "metadata")
    with Checkpointer(run_dir, log=lambda line: None) as checkpointer:
        with pytest.raises(CheckpointError, match="none of the checkpoints 10, 20 in .* reads bac"):
            checkpointer.restore_latest(abstract(make_state()))
    assert names(run_dir) == ["00000010", "00000020"]


# Another model -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused_by_its_first_leaf(run_dir):
    with Checkpointer(run_dir) as checkpointer:
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore_latest(abstract(make_state(dim=5)))
        message = str(error.value)
        assert "\n" not in message
        assert "is of another model: opt/1/0/mu/layers/up is float32[2,4,300] there and" in message
        assert "float32[2,5,300] here; use the configuration it was made with" in message

        fewer, more = abstract(make_state()), abstract(make_state())
        del fewer["mask"]
        more["method"] = {"slow": jax.ShapeDtypeStruct((3,), jnp.float32)}
        with pytest.raises(CheckpointError, match="it has mask, which this model has not"):
            checkpointer.restore_latest(fewer)
        with pytest.raises(CheckpointError, match="method/slow is not in it"):
            checkpointer.restore_latest(more)
        # a part must match whole: a tied model may not take an untied one's parameters
        part = {"params": {"scale": fewer["params"]["scale"]}}
        with pytest.raises(CheckpointError, match="it has params/layers/up"):
            checkpointer.restore(part, partial=True)
    assert names(run_dir) == ["00000010", "00000020"]  # it is not damaged


# Writing that fails --------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp
from lcl.checkpoints import Checkpointer, CheckpointError, CheckpointPolicy
state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
c = Checkpointer(sys.argv[1])
c.save(1, state, {}, blocking=True)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # every file over 100 kB fails
try:
    c.save(2, state, {})
    while True:
        c.check()  # as the loop does after every step
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(c.steps(), sorted(p.name for p in c.directory.iterdir()))
c.save(3, {"w": state["w"] + 1}, {})  # space was made: the same object goes on
c.close()
abstract = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
print(Checkpointer(sys.argv[1]).restore_latest(abstract).step)
"""


def test_a_failed_write_is_raised_by_check_and_loses_nothing(run_python, tmp_path):
    """orbax#605: a failed background save was noticed late. A file-size limit plays a full disk."""
    first, *rest = run_python(FULL_DISK, str(tmp_path / "run")).splitlines()
    assert first.startswith(f"checkpoint 2 could not be written to {tmp_path}/run/checkpoints (")
    assert "File too large): free some space or keep fewer" in first
    assert first.endswith("then resume; intact checkpoints: 1")
    assert rest == ["[1] ['00000001']", "3"]


def test_no_space_left_at_the_end_of_the_run_is_one_line(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, blocking=True)

        def fail():
            raise ValueError('RESOURCE_EXHAUSTED: writing "d/1": No space left on device [os=28]')

        checkpointer.save(2, make_state(2), {})
        checkpointer._orbax.wait_until_finished()
        monkeypatch.setattr(checkpointer._orbax, "wait_until_finished", fail)
        with pytest.raises(CheckpointError, match=r"\(No space left on device\): free some space"):
            checkpointer.wait()
        monkeypatch.undo()


def test_a_run_directory_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write checkpoints in .*Not a directory") as e:
        Checkpointer(tmp_path / "file" / "run")
    assert "give another --run_dir" in str(e.value) and "\n" not in str(e.value)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "touch", refuse)
    with pytest.raises(CheckpointError, match=r"\(Permission denied\): mend its permissions"):
        Checkpointer(tmp_path / "run")


def test_metadata_must_be_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(1, make_state(), {"a": object()})
        assert checkpointer.steps() == []


def test_an_exception_in_the_block_still_completes_the_last_save(tmp_path):
    """MaxText#416: the last checkpoint was partial."""
    with pytest.raises(RuntimeError, match="the loop broke"):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(5, make_state(5), {})
            raise RuntimeError("the loop broke")
    restored, _ = restore_logged(tmp_path)
    assert same(restored.state, make_state(5))
