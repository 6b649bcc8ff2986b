"""The run's logs: exactly once a step, whatever is killed and wherever a line is torn."""

from __future__ import annotations

import doctest
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lcl.report.writers
from lcl.report.writers import MetricsWriter, WriterError, encode, parse_line, tag


@pytest.fixture(autouse=True, scope="module")
def disk():
    """Hundreds of small runs: what fsync is called for is recorded, the disk left in peace."""
    with mock.patch("os.fsync") as fsync:
        yield fsync


NUM_STEPS = 8
EVERY = 4  # evaluations and checkpoints


def metrics_line(step: int) -> dict:
    loss = np.float32(2.0 / (step + 3))
    return {"step": step, "stage": "en", "loss": loss, "loss/en": loss, "tokens": 64 * (step + 1)}


def evals_line(step: int, kind: str) -> dict:
    value = 5.0 / (step + 7)
    return {
        "step": step,
        "stage_index": 0,
        "stage": "en",
        "kind": kind,
        "domains": {"en": {"nats_per_token": value, "bits_per_byte": value, "tokens": 3}},
    }


def evaluate(writer, step, kind):
    if not writer.has_eval(evals_line(step, kind)):
        writer.evals(evals_line(step, kind))


def train(run_dir, start: int, stop: int = NUM_STEPS, tensorboard: bool = False) -> None:
    """A loop with the order of a real one: update, log, evaluate, flush, checkpoint."""
    with MetricsWriter(run_dir, start, tensorboard=tensorboard) as writer:
        if start == 0:
            evaluate(writer, 0, "start")
        elif start % EVERY == 0:  # What a kill between checkpoint and evaluation left undone.
            evaluate(writer, start, "interval")
        for step in range(start, stop):
            writer.metrics(metrics_line(step))
            writer.timings({"step": step, "tokens_per_second": 1.0})
            if (step + 1) % EVERY == 0:
                evaluate(writer, step + 1, "interval")
                writer.flush()


def contents(run_dir):
    return {n: (run_dir / f"{n}.jsonl").read_bytes() for n in ("metrics", "evals", "timings")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    train(run_dir, 0)
    return contents(run_dir)


def test_the_uninterrupted_log(whole):
    lines = [json.loads(x) for x in whole["metrics"].splitlines()]
    assert [x["step"] for x in lines] == list(range(NUM_STEPS))
    evals = [json.loads(x) for x in whole["evals"].splitlines()]
    assert [(x["step"], x["kind"]) for x in evals] == [
        (0, "start"),
        (4, "interval"),
        (8, "interval"),
    ]


@pytest.mark.parametrize("name", ["metrics", "evals", "timings"])
def test_a_kill_at_every_byte_of_the_tail_loses_and_doubles_nothing(name, whole, tmp_path):
    """For every checkpoint step and every byte at which the file can end after it."""
    data = whole[name]
    for resume in (0, 4, 8):
        last = resume if name == "evals" else resume - 1
        lines = data.splitlines(keepends=True)
        # The flush before the checkpoint put these on disk. An evaluation AT the checkpoint's step
        # may come after it, so it is not among what is sure to be there.
        sure = [
            x for x in lines if json.loads(x)["step"] < (resume if name == "evals" else last + 1)
        ]
        begin = len(b"".join(sure))
        end = len(b"".join(lines[: len(sure) + 2]))  # Every byte of the two lines that follow.
        for cut in range(begin, end + 1):
            run_dir = tmp_path
            for other, text in whole.items():
                (run_dir / f"{other}.jsonl").write_bytes(text[:cut] if other == name else text)
            train(run_dir, resume)
            assert contents(run_dir) == whole, (resume, cut)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_of_kills_ends_in_the_same_bytes(data, whole, tmp_path_factory):
    """Several kills, each tearing all three files somewhere after what was flushed."""
    run_dir = tmp_path_factory.mktemp("kills")
    checkpoint = 0
    for _ in range(data.draw(st.integers(1, 4), label="kills")):
        reached = data.draw(st.integers(checkpoint, NUM_STEPS), label="reached")
        train(run_dir, checkpoint, reached)
        saved = [s for s in range(checkpoint, reached + 1)]
        checkpoint = data.draw(st.sampled_from(saved), label="checkpoint")
        for name in ("metrics", "evals", "timings"):
            path = run_dir / f"{name}.jsonl"
            text = path.read_bytes()
            sure = sum(
                len(x) for x in text.splitlines(keepends=True) if json.loads(x)["step"] < checkpoint
            )
            junk = data.draw(st.sampled_from([b"", b"\0\0\0", b"\xff", b'{"step"']), label="junk")
            path.write_bytes(text[: data.draw(st.integers(sure, len(text)))] + junk)
    train(run_dir, checkpoint)
    assert contents(run_dir) == whole


def test_sigkill_of_a_real_process_leaves_whole_lines_before_the_last(tmp_path):
    code = """
        import sys
        from lcl.report.writers import MetricsWriter
        writer = MetricsWriter(sys.argv[1], 0, tensorboard=False)
        for step in range(10**9):
            writer.metrics({"step": step, "stage": "en", "loss": 1.5})
            if step == 200:
                print("go", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout.readline() == b"go\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    MetricsWriter(tmp_path, 150, tensorboard=False).close()
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(150))


def test_flush_forces_every_log_to_disk(tmp_path, disk):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.metrics(metrics_line(0))
    disk.reset_mock()
    writer.flush()
    forced = {call.args[0] for call in disk.call_args_list}
    assert forced == {log._file.fileno() for log in writer._logs.values()} and len(forced) == 3
    writer.close()


def test_a_truncation_is_on_disk_before_it_takes_the_place_of_the_log(tmp_path, disk):
    train(tmp_path, 0)
    calls = []
    replace = os.replace
    disk.side_effect = lambda *_: calls.append("fsync")
    with mock.patch("os.replace", lambda a, b: (calls.append("replace"), replace(a, b))):
        MetricsWriter(tmp_path, 4, tensorboard=False).close()
    disk.side_effect = None
    assert calls[:3] == ["fsync", "replace", "fsync"]  # the file, its name, the directory


def test_a_new_run_starts_with_empty_logs(tmp_path):
    train(tmp_path, 0)
    MetricsWriter(tmp_path, None, tensorboard=False).close()
    assert contents(tmp_path) == {"metrics": b"", "evals": b"", "timings": b""}


def test_nothing_to_drop_leaves_the_file_alone(tmp_path):
    train(tmp_path, 0)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsWriter(tmp_path, NUM_STEPS, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_evaluation_twice_is_written_once(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        assert writer.evals(evals_line(4, "interval")) is True
        assert writer.evals(evals_line(4, "interval")) is False
        assert writer.evals(evals_line(4, "stage_end")) is True
        line = {"step": 4, "stage_index": 0, "kind": "interval"}
        assert writer.has_eval(line) and not writer.has_eval(line | {"stage_index": 1})
    assert len((tmp_path / "evals.jsonl").read_text().splitlines()) == 2


def test_a_branch_counts_where_it_left_the_trunk(tmp_path):
    """Resumed between a branch's beginning and the step it was annealed to, its line stays."""

    def branch(at):
        return evals_line(at + 4, "branch") | {"branch_from": at}

    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.evals(evals_line(2, "interval"))
        assert writer.evals(branch(2)) and not writer.evals(branch(2))
        writer.evals(evals_line(4, "interval"))
        writer.evals(branch(4))
        writer.evals(evals_line(6, "stage_end"))
    kept = (tmp_path / "evals.jsonl").read_bytes().splitlines(keepends=True)
    with MetricsWriter(tmp_path, 3, tensorboard=False) as writer:
        assert writer.has_eval(branch(2)) and not writer.has_eval(branch(4))
        assert (tmp_path / "evals.jsonl").read_bytes() == b"".join(kept[:2])
    with MetricsWriter(tmp_path, 2, tensorboard=False) as writer:
        assert writer.has_eval(branch(2))
        writer.evals(evals_line(4, "interval"))
        writer.evals(branch(4))
        writer.evals(evals_line(6, "stage_end"))
    assert (tmp_path / "evals.jsonl").read_bytes() == b"".join(kept)


def test_events_without_a_step_survive_a_resume(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.timings({"event": "compile", "seconds": 2.5})
        writer.timings({"step": 3, "tokens_per_second": 1.0})
    MetricsWriter(tmp_path, 2, tensorboard=False).close()
    assert (tmp_path / "timings.jsonl").read_text() == '{"event": "compile", "seconds": 2.5}\n'


def test_only_the_first_process_writes(tmp_path):
    with MetricsWriter(tmp_path / "run", 0, primary=False) as writer:
        writer.metrics(metrics_line(0))
        writer.evals(evals_line(0, "start"))
        writer.timings({"step": 0})
    assert not (tmp_path / "run").exists()


# Floats.


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(0, 2**32 - 1))
def test_every_float32_reads_back_bit_for_bit(bits):
    value = np.frombuffer(struct.pack("<I", bits), np.float32)[0]
    line = json.loads(encode({"x": value}))
    if np.isfinite(value):
        back = np.float32(line["x"])
        assert back.tobytes() == value.tobytes()
    else:
        assert line["x"] is None and line["nonfinite"]["x"] in ("nan", "inf", "-inf")


@settings(max_examples=100, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_every_python_float_reads_back(value):
    assert json.loads(encode({"x": value}))["x"] == value


def test_floats_are_short_and_nonfinite_is_strict_json():
    assert encode({"a": np.float32(0.1), "b": 0.1}) == b'{"a": 0.1, "b": 0.1}\n'
    assert encode({"a": np.array(3, np.int32), "b": np.array(0.2, np.float32)}) == (
        b'{"a": 3, "b": 0.2}\n'
    )
    line = encode({"step": 1, "d": {"en": [1.0, -np.inf]}})
    assert b"Infinity" not in line
    assert json.loads(line) == {
        "step": 1,
        "d": {"en": [1.0, None]},
        "nonfinite": {"d.en.1": "-inf"},
    }


def test_parse_line_takes_only_log_lines():
    assert parse_line(b"[1]") is None
    assert parse_line(b'{"step": "three"}') is None
    assert parse_line(b"\xff\xfe") is None


# Errors.


def test_a_broken_line_before_lines_we_need_is_refused_by_number(tmp_path):
    train(tmp_path, 0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{oops\n", *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(WriterError, match=r"metrics\.jsonl:2 is not a log line") as error:
        MetricsWriter(tmp_path, 4, tensorboard=False)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("hello")
    with pytest.raises(WriterError, match="another --run_dir") as error:
        MetricsWriter(tmp_path / "run", 0, tensorboard=False)
    assert "\n" not in str(error.value)


def test_no_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # chmod does not stop root
    with pytest.raises(WriterError, match="Permission denied.*you may write to") as error:
        MetricsWriter(tmp_path / "run", 0, tensorboard=False)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.metrics(metrics_line(0))
    log = writer._logs["metrics"]

    class Full:
        """Takes half of what it is given, then no more, as a disk does that fills up."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    log._file = Full(log._file)
    with pytest.raises(WriterError, match="No space left on device; free some space") as error:
        writer.metrics(metrics_line(1))
    assert "\n" not in str(error.value) and "metrics.jsonl" in str(error.value)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == encode(metrics_line(0))


# TensorBoard.


def read_scalars(logdir):
    """{tag: [(step, value), ...]} of all event files, honouring the purge as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    scalars: dict[str, list] = {}
    for path in sorted(logdir.iterdir(), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                for points in scalars.values():
                    points[:] = [p for p in points if p[0] < event.step]
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    train(tmp_path, 0, 6, tensorboard=True)
    train(tmp_path, 4, tensorboard=True)
    scalars = read_scalars(tmp_path / "tensorboard")
    assert [s for s, _ in scalars["train/loss"]] == list(range(NUM_STEPS))
    assert [s for s, _ in scalars["train/loss_by_domain/en"]] == list(range(NUM_STEPS))
    # The evaluation at step 4 was kept in evals.jsonl and purged from the events: it is told again.
    assert [s for s, _ in scalars["heldout/en/nats_per_token"]] == [0, 4, 8]
    assert "perf/tokens_per_second" in scalars
    assert scalars["train/loss"][1][1] == pytest.approx(0.5)


def test_tags_are_grouped():
    assert tag("train", "loss/en") == "train/loss_by_domain/en"
    assert tag("train", "grad_norm") == "train/grad_norm"


def test_tensorboardx_is_imported_only_when_used():
    code = "import sys, lcl.report; assert 'tensorboardX' not in sys.modules, 'eager'"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.report.writers).failed == 0
