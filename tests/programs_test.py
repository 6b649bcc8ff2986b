"""Compiled programs: each once, traced one at a time, whichever threads ask."""

from __future__ import annotations

import threading
import time

import jax
import pytest

from lcl.parallel import MeshConfig
from lcl.programs import Compiler


@pytest.fixture
def compiler():
    return Compiler(MeshConfig().build(jax.devices()[:1]))


class Program:
    """What `jax.jit` gives, as far as a compiler asks; it knows whether others are being traced."""

    inside = 0
    together = 0

    def lower(self, *_):
        Program.inside += 1
        Program.together = max(Program.together, Program.inside)
        time.sleep(0.02)
        Program.inside -= 1
        return self

    def compile(self):
        return self


def test_programs_are_traced_one_at_a_time_and_each_is_made_once(compiler):
    """Flax changes a class as it traces: two threads at once have lost a dictionary's iteration."""
    made = []

    def ask(number):
        made.append(compiler.compile("step", number % 3, Program(), ()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Program.together == 1
    assert len(made) == 9 and len(set(map(id, made))) == len(compiler) == 3


def test_a_mistake_while_tracing_reaches_all_who_wait(compiler):
    class Broken(Program):
        def lower(self, *_):
            raise ValueError("no such shape")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such shape"):
            compiler.compile("step", 0, Broken(), ())
    assert not compiler.tracing.locked()
