"""lcl.data.block_cache: arrays made block by block, kept, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from lcl.data.block_cache import cached_rows

FIELDS = {"a": ((2,), np.int32), "b": ((), np.float32)}


class Maker:
    """Rows i -> ([i, i + 1], i / 2), in blocks of 3; fails at a row if told."""

    def __init__(self, num_rows, fail_at=None):
        self.num_rows, self.fail_at, self.starts, self.rows = num_rows, fail_at, [], []

    def __call__(self, start):
        self.starts.append(start)
        for first in range(start, self.num_rows, 3):
            i = np.arange(first, min(first + 3, self.num_rows))
            if self.fail_at is not None and self.fail_at in i:
                raise RuntimeError("killed")
            self.rows += i.tolist()
            yield np.column_stack([i, i + 1]), i / 2


def check(arrays, num_rows):
    i = np.arange(num_rows)
    assert np.array_equal(arrays["a"], np.column_stack([i, i + 1]))
    assert np.array_equal(arrays["b"], (i / 2).astype(np.float32))


def get(folder, maker, name=("x", 1)):
    return cached_rows(folder, name, maker.num_rows, lambda: FIELDS, maker)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 10])
@pytest.mark.parametrize("cached", [True, False])
def test_made_once_and_found_again(tmp_path, num_rows, cached):
    folder = tmp_path / "cache" if cached else None
    maker = Maker(num_rows)
    check(get(folder, maker), num_rows)
    check(get(folder, maker), num_rows)
    assert len(maker.rows) == num_rows * (1 if cached else 2)


def test_another_name_is_something_else(tmp_path):
    check(get(tmp_path, Maker(4), ("x", 1)), 4)
    maker = Maker(4)
    get(tmp_path, maker, ("x", 2))
    assert maker.rows == [0, 1, 2, 3]


@pytest.mark.parametrize("fail_at", [0, 4, 9])
def test_it_goes_on_where_it_ended(tmp_path, fail_at):
    with pytest.raises(RuntimeError):
        get(tmp_path, Maker(10, fail_at))
    maker = Maker(10)
    check(get(tmp_path, maker), 10)
    assert maker.starts == [fail_at // 3 * 3]


def test_a_kill_loses_a_block_at_most(tmp_path):
    code = (
        "import numpy as np, os, signal, sys\n"
        "from lcl.data.block_cache import cached_rows\n"
        "def make(start):\n"
        "    for i in range(start, 10):\n"
        "        if i == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield [np.array([[i, i + 1]]), np.array([i / 2])]\n"
        "fields = {'a': ((2,), np.int32), 'b': ((), np.float32)}\n"
        "cached_rows(sys.argv[1], ('x', 1), 10, lambda: fields, make)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    maker = Maker(10)
    check(get(tmp_path, maker), 10)
    assert maker.starts == [6]


def test_what_is_torn_is_said_and_made_again(tmp_path, caplog):
    get(tmp_path, Maker(5))
    (array,) = tmp_path.glob("*/a.npy")
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(bytes(data))
    maker = Maker(5)
    check(get(tmp_path, maker), 5)
    assert maker.rows == [0, 1, 2, 3, 4]
    assert "is torn: making it again" in caplog.text


def test_half_made_rows_that_do_not_fit_are_made_anew(tmp_path):
    with pytest.raises(RuntimeError):
        get(tmp_path, Maker(10, 7))
    (done,) = tmp_path.glob("*.partial/done.json")
    assert json.loads(done.read_text()) == {"rows": 6}
    np.save(done.parent / "a.npy", np.zeros((3, 2), np.int32))
    maker = Maker(10)
    check(get(tmp_path, maker), 10)
    assert maker.starts == [0]


def test_several_at_once_make_it_once(tmp_path):
    maker, found = Maker(30), []
    threads = [
        threading.Thread(target=lambda: found.append(get(tmp_path, maker))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for arrays in found:
        check(arrays, 30)
    assert sorted(maker.rows) == list(range(30))


def test_a_maker_that_gives_too_little_is_a_mistake():
    with pytest.raises(AssertionError, match="gave 2 rows, not 5"):
        cached_rows(None, ("x",), 5, lambda: {"a": ((), np.int64)}, lambda s: [[np.arange(2)]])


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot keep neighbours under .*; give a writable"):
        get(tmp_path / "file" / "cache", Maker(3))
