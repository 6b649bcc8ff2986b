"""Being told to go: SIGTERM and Ctrl-C, answered at the border of two steps, or at once.

    with Preemption() as preemption:
        with preemption.nothing_to_save():       # start-up, compilation: everything is on disk
            ...                                  #   a signal here ends the process at once
        for step in ...:
            train_step(...)                      #   a signal here sets a flag; the step is finished
            if preemption.should_stop(step + 1):
                save(...)
                break

How a process that was told to go ends says what its launcher should do:

    0     the run is complete: nothing more to do
    75    SIGTERM (a machine taken away, a scheduler's stop): all is saved, start it again
    130   Ctrl-C: all is saved, and somebody wanted it to stop
    else  it failed: look at the log

75 is EX_TEMPFAIL of sysexits.h, "try again later", which nothing else in the process gives.

Python runs a signal's handler in the main thread, and only between two bytecodes; XLA may compile
for a minute without coming back to one. So a second thread listens to the bytes that the
interpreter's C-level handler writes to a socket (`signal.set_wakeup_fd`), which needs no bytecode
of the main thread: it can end the process while the main thread is deep in a compiler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("lcl.preemption")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# "Told to go, and nothing is lost: start me again" (EX_TEMPFAIL of sysexits.h). The launchers start
# again on this code and on no other.
EXIT_PREEMPTED = 75


class Preemption:
    """Watches for SIGTERM and SIGINT while it is entered; gives the old handlers back afterwards.

    The first signal asks the loop to stop. A second Ctrl-C ends the process on the spot; a second
    SIGTERM changes nothing, since schedulers repeat it. Entered outside the main thread (a
    notebook's worker) it watches nothing, and says so.

    Args:
        agree_every: with several processes, how often (in steps) they ask each other at the most;
            see `should_stop`.
        agree_seconds: ... and how long apart at the most, as far as whole steps allow.
    """

    def __init__(self, *, agree_every: int = 10, agree_seconds: float = 2.0):
        self._agree_every = agree_every
        self._agree_seconds = agree_seconds
        self._agreed_at: tuple[int, float] | None = None  # step and time of the last exchange
        self._next_agreement: int | None = None
        self._number: int | None = None  # the first signal
        self._requested = threading.Event()
        self._lock = threading.RLock()
        self._unsaved_nothing = 0  # how many nothing_to_save blocks the main thread is in
        self._callbacks: list[Callable[[], None]] = []
        self._old_handlers: dict[int, Any] = {}
        self._old_fd = -1
        self._write: socket.socket | None = None
        self._watcher: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether this process has been told to stop."""
        return self._requested.is_set()

    @property
    def exit_code(self) -> int:
        """What a process that stops now ends with; see the top of this file."""
        return 128 + signal.SIGINT if self._number == signal.SIGINT else EXIT_PREEMPTED

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after `step` updates; the same answer on every process.

        One process: `requested`. Several: a signal reaches them at different steps, and a save
        needs all of them, so they exchange their flags (one tiny all-gather) every `agree_every`
        steps, and oftener where these last longer than `agree_seconds`: a machine that is taken
        away gives half a minute, and a step of a million tokens may take that long.
        """
        import jax

        if jax.process_count() == 1:
            return self.requested
        if self._next_agreement is not None and step < self._next_agreement:
            return False
        import numpy as np
        from jax.experimental import multihost_utils

        now, seconds = time.monotonic(), 0.0
        if self._agreed_at is not None and step > self._agreed_at[0]:
            seconds = (now - self._agreed_at[1]) / (step - self._agreed_at[0])
        mine = np.array([float(self.requested), seconds], np.float32)
        flags, steps = np.reshape(multihost_utils.process_allgather(mine), (-1, 2)).T
        # From what all have seen alike, so that all ask again at the same step.
        slowest = float(steps.max())
        every = 1
        if slowest > 0:
            every = max(1, min(self._agree_every, int(self._agree_seconds / slowest)))
        self._agreed_at, self._next_agreement = (step, now), step + every
        return bool(flags.any())

    def before_exit(self, callback: Callable[[], None]) -> None:
        """Registers something short (a flush) to run before an exit at once; not before others."""
        self._callbacks.append(callback)

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """A block in which a signal ends the process at once: EXIT_PREEMPTED, or 130 for
        Ctrl-C.

        May be nested. If the signal has come already, entering raises SystemExit.
        """
        if self._watcher is None:
            yield
            return
        if self.requested:
            raise SystemExit(self.exit_code)
        # An event loop that ran in this thread meanwhile (Orbax's) may have taken the descriptor.
        assert self._write is not None
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        with self._lock:
            self._unsaved_nothing += 1
        try:
            yield
        finally:
            with self._lock:  # held by the watcher while it ends the process
                self._unsaved_nothing -= 1

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            log.info("not in the main thread: signals are left to the main thread")
            return self
        read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._watcher = threading.Thread(
            target=self._watch, args=(read,), name="lcl-preemption", daemon=True
        )
        self._watcher.start()
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watcher is None:
            return
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        assert self._write is not None
        self._write.close()  # the watcher reads the end and returns
        self._watcher.join()
        self._watcher = self._write = None

    def _handle(self, number: int, frame: object) -> None:
        """The Python-level handler: passes the signal on, in case the descriptor was not ours."""
        if not self.requested:
            with contextlib.suppress(OSError, AttributeError):
                self._write.send(bytes([number]))  # type: ignore[union-attr]

    def _watch(self, read: socket.socket) -> None:
        """The watcher thread: one byte a signal."""
        interrupts = 0
        with read:
            while data := read.recv(64):
                for number in data:
                    if number not in _SIGNALS:
                        continue
                    first, name = not self.requested, signal.Signals(number).name
                    if first:
                        self._number = number
                    interrupts += number == signal.SIGINT
                    self._requested.set()
                    with self._lock:
                        if self._unsaved_nothing:
                            self._leave(f"{name}: nothing is unsaved, leaving")
                        elif interrupts > 1:
                            self._number = number
                            self._leave(f"second {name}: leaving without saving")
                    if first:
                        log.warning("%s: stopping after this step, with a checkpoint", name)

    def _leave(self, message: str) -> None:
        """Ends the process from the watcher's thread, whatever the main thread is doing."""
        for callback in self._callbacks:
            with contextlib.suppress(Exception):
                callback()
        with contextlib.suppress(Exception):
            log.warning(message)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.exit_code)
