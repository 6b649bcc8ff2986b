"""How far the host runs ahead of the devices: programs that it started and did not wait for."""

from __future__ import annotations

import collections
from typing import Any

# Of small programs started one after the other. XLA's CPU backend lets 32 be in flight on a device
# and then holds back the next one's launch, on each device for itself: one device then waits in a
# sum for another whose launch is held back, for good where the pool has no third thread (seen with
# 2 devices on 2 cores in 3 of some 37 loaded runs, when a state had more leaves to digest).
SMALL_PROGRAMS = 8


class RunAhead:
    """Waits, as each program is started, for the one that was started `depth` before it.

    Args:
      depth: programs that may be under way beside the newest, 0 or more.

    Example:
      >>> import jax.numpy as jnp
      >>> ahead = RunAhead(1)
      >>> for x in range(3):
      ...     ahead.add(jnp.sqrt(x))
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._under_way: collections.deque[Any] = collections.deque()

    def add(self, started: Any) -> None:
        """Takes what a program that was just started gives (a pytree; None: none was started)."""
        import jax

        self._under_way.append(started)
        if len(self._under_way) > self._depth:
            jax.block_until_ready(self._under_way.popleft())
