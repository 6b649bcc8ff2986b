"""The progress line on a terminal, in a file, and switched off."""

from __future__ import annotations

import doctest
import io

import lcl.report.progress
from lcl.report.progress import Progress, duration, human


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


FIELDS = {
    "stage": "en",
    "stage_step": 120,
    "stage_steps": 500,
    "loss": 2.3149,
    "learning_rate": 3e-4,
    "tokens_per_second": 12_345.0,
    "mfu": 0.412,
}


def test_the_line_says_everything():
    clock = Clock()
    bar = Progress(192, start_step=119, stream=io.StringIO(), clock=clock)
    clock.now = 1.0
    bar.update(120, **FIELDS)
    assert bar.line() == (
        "stage en 120/500  loss 2.31  lr 3.0e-04  12.3k tok/s  MFU 41%  ETA 0:01:12"
    )


def test_in_a_file_lines_are_plain_spaced_and_end_with_the_last_state():
    clock, out = Clock(), io.StringIO()
    with Progress(100, stream=out, every_seconds=10, clock=clock, flop_convention="causal") as bar:
        for step in range(1, 101):
            clock.now += 1.0
            bar.update(step, **FIELDS)
        bar.log("saved step 100")
    text = out.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "MFU: causal"
    assert text.count("MFU: causal") == 1
    assert 10 <= sum(x.startswith("step ") for x in lines) <= 12
    assert lines[-2] == "saved step 100"
    assert lines[-1].startswith("step 100/100 (100%)  stage en")
    assert lines[-1].endswith("ETA 0:00:00")


def test_on_a_terminal_there_is_one_bar_with_the_line():
    out = Terminal()
    bar = Progress(10, start_step=4, stream=out)
    bar.update(5, **FIELDS)
    bar.log("a line above")
    bar.close()
    bar.close()
    text = out.getvalue()
    assert "\r" in text and "stage en 120/500" in text and "a line above\n" in text
    assert "50%" in text


def test_disabled_writes_nothing():
    out = Terminal()
    with Progress(10, stream=out, enabled=False, flop_convention="causal") as bar:
        bar.update(1, **FIELDS)
        bar.log("hello")
    assert out.getvalue() == ""


def test_the_first_interval_with_its_compilation_does_not_spoil_the_eta():
    clock = Clock()
    bar = Progress(102, stream=io.StringIO(), clock=clock)
    clock.now = 60.0  # the first step compiles
    bar.update(1)
    clock.now = 61.0
    bar.update(2)
    assert bar.line() == "ETA 0:01:40"
    bar.pause()  # an evaluation of 30 s
    clock.now = 91.0
    bar.update(2)
    clock.now = 92.0
    bar.update(3)
    assert bar.line() == "ETA 0:01:39"


def test_what_is_not_given_keeps_its_last_value():
    bar = Progress(10, stream=io.StringIO())
    bar.update(1, **FIELDS)
    bar.update(2, stage_step=121)
    assert "en 121/500  loss 2.31" in bar.line()


def test_numbers_for_people():
    assert [human(x) for x in (0, 999, 1000, 3.2e9)] == ["0", "999", "1.0k", "3.2G"]
    assert duration(-1) == "0:00:00"


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.report.progress).failed == 0
