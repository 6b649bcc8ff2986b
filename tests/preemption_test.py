"""Signals in child processes: at once while nothing is unsaved, at the step's border otherwise."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from lcl.preemption import EXIT_PREEMPTED, Preemption

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# One bytecode of the main thread that lasts a minute: no Python handler can run meanwhile.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha512', b'x', b'y', 60_000_000)"
COMPILE = """
import jax, jax.numpy as jnp
def slow(x):
    return [jnp.sort(jnp.sin(x * i) @ jnp.cos(x + i), axis=i % 2) for i in range(1000)]
lowered = jax.jit(slow).lower(jnp.ones((4, 4)))
print("ready", flush=True)
lowered.compile()  # a minute and a half
"""


def start(code: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.communicate()
    return child


def finish(child: subprocess.Popen[str], *signals: int, wait: float = 10) -> tuple[int, str, str]:
    """Sends the signals and waits far less than the child's native call would last."""
    for number in signals:
        child.send_signal(number)
    try:
        out, err = child.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        child.kill()
        pytest.fail(f"the child was still there {wait} s after the signal")
    return child.returncode, out, err


@pytest.mark.parametrize("what", ["native", "compile"])
def test_a_signal_in_the_middle_of_a_native_call_ends_the_process_at_once(what):
    ready = 'print("ready", flush=True)'
    inside = f"{ready}; {BUSY}" if what == "native" else COMPILE
    child = start(
        "from lcl.preemption import Preemption\n"
        "with Preemption() as p:\n"
        "    p.before_exit(lambda: print('flushed', flush=True))\n"
        "    with p.nothing_to_save():\n"
        f"        exec({inside!r})\n"
        "        print('not reached')\n"
    )
    code, out, err = finish(child, signal.SIGTERM)
    assert (code, out) == (EXIT_PREEMPTED, "flushed\n")
    assert "SIGTERM" in err and "Traceback" not in err


def test_ctrl_c_while_nothing_is_unsaved_exits_130():
    child = start(
        "from lcl.preemption import Preemption\n"
        "with Preemption() as p, p.nothing_to_save():\n"
        f"    print('ready', flush=True); {BUSY}\n"
    )
    assert finish(child, signal.SIGINT)[0] == 130


LOOP = """
import time
from lcl.preemption import Preemption
with Preemption() as p:
    with p.nothing_to_save():
        pass
    print("ready", flush=True)
    for step in range(1000):
        time.sleep(0.1); time.sleep(0.1)      # the step: a signal must not cut it short
        print("step done", flush=True)
        if p.should_stop(step + 1):
            time.sleep(0.3)
            print("saved", flush=True)
            break
"""


@pytest.mark.parametrize("times", [1, 3])
def test_sigterm_in_the_loop_lets_the_step_and_the_save_finish(times):
    code, out, err = finish(start(LOOP), *[signal.SIGTERM] * times)
    assert code == 0, err
    assert out.endswith("step done\nsaved\n")


def test_a_second_ctrl_c_ends_the_process_even_in_a_native_call():
    child = start(
        "from lcl.preemption import Preemption\n"
        f"with Preemption() as p:\n    print('ready', flush=True); {BUSY}\n"
    )
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and "stopping after this step" in child.stderr.readline()
    assert finish(child, signal.SIGINT)[0] == 130


def test_a_signal_before_the_block_leaves_on_entering_it():
    child = start(
        "import os, signal, time\n"
        "from lcl.preemption import Preemption\n"
        "with Preemption() as p:\n"
        "    print('ready', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not p.requested: time.sleep(0.01)\n"
        "    with p.nothing_to_save():\n"
        "        print('not reached')\n"
    )
    assert finish(child)[:2] == (EXIT_PREEMPTED, "")


def test_an_event_loop_that_took_the_descriptor_does_not_deafen_the_watcher():
    child = start(
        "import signal, socket\n"
        "from lcl.preemption import Preemption\n"
        "with Preemption() as p:\n"
        "    signal.set_wakeup_fd(-1)\n"  # what uvloop leaves behind
        "    with p.nothing_to_save():\n"
        f"        print('ready', flush=True); {BUSY}\n"
    )
    assert finish(child, signal.SIGTERM)[0] == EXIT_PREEMPTED


def test_after_an_orbax_save_a_signal_still_reaches_a_native_call(tmp_path):
    child = start(
        "import jax.numpy as jnp\n"
        "from lcl.checkpoints import Checkpointer\n"
        "from lcl.preemption import Preemption\n"
        "with Preemption() as p:\n"
        f"    with Checkpointer({str(tmp_path)!r}) as c:\n"
        "        c.save(1, {'w': jnp.ones(3)}, {}, blocking=True)\n"
        "    with p.nothing_to_save():\n"
        f"        print('ready', flush=True); {BUSY}\n"
    )
    assert finish(child, signal.SIGTERM)[0] == EXIT_PREEMPTED


def test_the_old_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) not in before
        assert not preemption.requested
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1
    assert not [t for t in threading.enumerate() if t.name == "lcl-preemption"]


def test_outside_the_main_thread_it_watches_nothing(caplog):
    caplog.set_level("INFO", "lcl.preemption")
    seen = []

    def work():
        with Preemption() as preemption, preemption.nothing_to_save():
            seen.append(preemption.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert "not in the main thread" in caplog.text


def test_processes_ask_each_other_by_steps_and_oftener_where_these_are_long(monkeypatch):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    clock, asked, step = [0.0], [], [0]

    def gather(mine):
        asked.append(step[0])
        return np.stack([mine, [float(step[0] >= 200), mine[1]]])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr("lcl.preemption.time.monotonic", lambda: clock[0])
    preemption = Preemption()
    stopped = []
    for step[0] in range(7, 210):
        stopped.append(preemption.should_stop(step[0]))
        clock[0] += 0.01 if step[0] < 100 else 1.0
        if stopped[-1]:
            break
    assert asked[:4] == [7, 8, 18, 28]
    assert np.diff(asked[-9:]).tolist() == [2] * 8
    assert 200 <= step[0] <= 201 and sum(stopped) == 1
