"""Places beside the run's own logs to which its scalars are sent as they come: `Tracker`, `WandB`.

A tracker is for looking: it sees what TensorBoard sees, under the same names, and decides nothing.
The logs in the run's directory stay the truth. If one fails in the middle of a run, a warning says
so and the run goes on without it.

    train/loss, train/loss_by_domain/en    heldout/en/nats_per_token    annealed/en/...    perf/mfu
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from lcl import files

log = logging.getLogger("lcl")


class Tracking(abc.ABC):
    """One run as a tracker has it open."""

    @abc.abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Takes {name: value} of a step of the run; returns at once."""

    @abc.abstractmethod
    def close(self) -> None:
        """Sends what is left."""


class Tracker(abc.ABC):
    """Where scalars may go (`Logging.trackers`); anything that opens a run as a `Tracking`."""

    def check(self) -> None:  # noqa: B027  (there may be nothing to check)
        """Refuses, before anything is compiled, what `open` could not do.

        Raises:
            ValueError: a package that is missing, say; one line with the mend.
        """

    @abc.abstractmethod
    def open(self, run_dir: str | os.PathLike[str], resume_step: int) -> Tracking:
        """Opens a run.

        Args:
            run_dir: its directory; the tracker may keep a file there.
            resume_step: updates that a resumed run has seen; 0 = a new run.
        """


@dataclasses.dataclass(frozen=True)
class WandB(Tracker):
    """Weights & Biases: the scalars over the run's own steps, the identity as its configuration.

    The id it has there is kept in RUN/wandb.json, so that a run which was killed goes on in the
    same curves; the steps it trains again are sent again, with the same values. A new run in an
    old directory gets a new id. Offline, everything is under RUN/wandb until `wandb sync`.

    Args:
        project: where the run appears.
        entity: whose project; None = that of the login.
        mode: "online" or "offline".
        name: of the run; None = its directory's name.
        tags: free words.

    >>> WandB(project="lcl", mode="off")
    Traceback (most recent call last):
    ValueError: WandB.mode='off' is unknown; use 'online' or 'offline'
    """

    project: str
    entity: str | None = None
    mode: str = "online"
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.project or "/" in self.project:
            raise ValueError(
                f"WandB.project={self.project!r} must be the name of a project; "
                "whose it is, is WandB.entity"
            )
        if self.mode not in ("online", "offline"):
            raise ValueError(f"WandB.mode={self.mode!r} is unknown; use 'online' or 'offline'")

    def check(self) -> None:
        """Refuses a machine without the package."""
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "WandB needs the package wandb, which is not here: pip install 'lcl[wandb]', or "
                "take it out of Logging.trackers"
            )

    def open(self, run_dir: str | os.PathLike[str], resume_step: int) -> Tracking:
        """See `Tracker`.

        Raises:
            ValueError: Weights & Biases did not take the run; one line with the mend.
        """
        self.check()
        import wandb

        place = files.place(run_dir)
        kept = place / "wandb.json"
        identifier = uuid.uuid4().hex[:12]
        if resume_step and kept.exists():
            identifier = json.loads(kept.read_text())["id"]
        try:
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or place.name,
                id=identifier,
                resume="allow" if self.mode == "online" else None,
                mode=self.mode,
                dir=None if files.is_remote(run_dir) else os.fspath(place),
                tags=list(self.tags),
                config=_identity(place),
            )
            # Over the run's steps: its own count of calls would refuse what is sent again.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"Weights & Biases did not take the run ({reason}): log in with `wandb login`, or "
                "set WandB.mode = 'offline'"
            ) from error
        known = {"id": identifier, "project": self.project, "entity": self.entity}
        files.write_whole(kept, (json.dumps(known) + "\n").encode())
        return _WandBRun(run)


class _WandBRun(Tracking):
    """A run at Weights & Biases."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Guarded(Tracking):
    """A tracking that may fail: it then warns once and is silent, and the run goes on."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self._tracking: Tracking | None = tracking
        self._name = name

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracking`."""
        self._try(lambda tracking: tracking.scalars(values, step))

    def close(self) -> None:
        """See `Tracking`."""
        self._try(lambda tracking: tracking.close())

    def _try(self, call: Any) -> None:
        if self._tracking is None:
            return
        try:
            call(self._tracking)
        except Exception as error:
            self._tracking = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning(
                "%s has failed (%s): no more is sent to it; the run's own logs go on",
                self._name,
                reason,
            )


def _identity(place: Any) -> dict[str, Any]:
    """What decides the run's result, for the tracker's table of configurations."""
    card = place / "run_card.json"
    return dict(json.loads(card.read_text()).get("identity") or {}) if card.exists() else {}
