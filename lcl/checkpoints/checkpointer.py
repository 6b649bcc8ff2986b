"""Checkpoints by Orbax: asynchronous, sharded, atomic, and checked bit for bit when they are read.

    RUN/checkpoints/00000100/            a finished checkpoint (the name appears by one rename)
                    00000200/
                    00000300.orbax-checkpoint-tmp/   being written; swept away if its writer died
                    00000200.corrupt/    was newest once, did not read back; kept for a look
                    00000300.abandoned/  of a line of steps that was rolled back

One checkpoint is one Orbax directory of two items: `state`, the arrays as nested dicts (leaves.py),
and `metadata`, a JSON document with the digest of every leaf (digest.py), the caller's metadata and
a checksum of itself. Each process writes its own shards; the digests are the same on every mesh, so
that a state restored onto another mesh or device count is still verified bit for bit.

Of Orbax we use `AsyncCheckpointer` with explicit handlers: the layer that `CheckpointManager`
stands on and that has not changed for years. Retention, fallback and setting aside are ours,
because they follow rules of ours: deletion is a rename first (a kill in between never leaves half a
checkpoint), and nothing is deleted before what replaces it is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from lcl.checkpoints.digest import state_digest
from lcl.checkpoints.errors import CheckpointError, Damaged, mend, reason
from lcl.checkpoints.leaves import describe, named_leaves, nest, unnest
from lcl.checkpoints.policy import CheckpointPolicy

logger = logging.getLogger("lcl.checkpoints")

_FORMAT = 1
_STEP = re.compile(r"\d{8,}")


class Restored(NamedTuple):
    """What came back: completed updates, the state on its devices, the caller's metadata."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
        run_dir: the run's directory; a local path or one that etils knows, such as gs://bucket/run.
        policy: cadence and retention.
        read_only: never change a file (for `lcl evaluate` and `lcl info` beside a running
        training). log: where the few lines that a user should see go (a fallback, a checkpoint set
        aside).

    Raises:
        CheckpointError: the directory can't be written.

    Example:
        >>> import jax, jax.numpy as jnp, tempfile
        >>> state, wanted = {"w": jnp.ones(3)}, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
        >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
        ...     _ = checkpointer.save(1, state, {"stage": "english"})
        ...     restored = checkpointer.restore_latest(wanted)
        >>> restored.step, restored.metadata
        (1, {'stage': 'english'})
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        policy: CheckpointPolicy | None = None,
        *,
        read_only: bool = False,
        log: Callable[[str], None] = logger.warning,
    ):
        from etils import epath

        self.policy = policy or CheckpointPolicy()
        # Orbax wants absolute paths; a relative one is meant from where we stand now.
        place = os.fspath(run_dir)
        self.directory = epath.Path(place if "://" in place else os.path.abspath(place))
        self.directory /= "checkpoints"
        self.read_only = read_only
        self._log = log
        self._orbax: Any = None  # made at the first save or restore: importing Orbax takes 0.3 s
        self._pending: int | None = None  # the step that the background thread is writing
        if not read_only:
            self._open_for_writing()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Looking ---------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        if not self.directory.exists():
            return []
        names = [path.name for path in self.directory.iterdir() if _STEP.fullmatch(path.name)]
        if str(self.directory).startswith("gs://"):  # no atomic rename there: a marker ends a save
            names = [n for n in names if (self.directory / n / "commit_success.txt").exists()]
        return sorted(int(name) for name in names)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step, without reading its arrays."""
        try:
            return self._read_document(step)["metadata"]
        except Damaged as error:
            raise CheckpointError(f"{self._path(step)}: {error}") from None

    # Saving ----------------------------------------------------------------------------------

    def save(
        self, step: int, state: Any, metadata: dict[str, Any], *, blocking: bool = False
    ) -> bool:
        """Saves the state after `step` completed updates.

        Returns once the arrays are copied off the devices (the caller may donate them at once); the
        files are written in the background unless `blocking` or the policy says otherwise. Where
        this step is on disk already: the same bits are left alone; other bits replace it, and the
        old one goes only when the new one is complete. Later steps on disk belong to a line that
        was rolled back, and are set aside.

        Args:
            step: completed updates.
            state: pytree of arrays (no flax boxes).
            metadata: anything JSON can hold; comes back with the state.
            blocking: wait for the files.

        Returns:
            False when the step was there already with the same bits, else True.

        Raises:
            CheckpointError: this save or the one before failed; the checkpoints before it are
            intact.
        """
        assert not self.read_only, "this Checkpointer was opened read-only"
        self.wait()
        document = _document(step, state, metadata)
        with self._explained(step):
            if step in self.steps():
                if self._same_bits(step, document):
                    return False
                self._move(step, "replaced")
            for later in [other for other in self.steps() if other > step]:
                self._move(later, "abandoned")
                self._log(f"checkpoint {later} is of an abandoned line of steps: set aside")
            args = self._args
            self._pending = step
            self._checkpointer().save(
                self._path(step),
                args=args.Composite(
                    state=args.PyTreeSave(nest(state)), metadata=args.JsonSave(document)
                ),
            )
        if blocking or not self.policy.asynchronous:
            self.wait()
        return True

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; costs microseconds."""
        if self._pending is not None:
            with self._explained(self._pending):
                self._orbax.check_for_errors()

    def wait(self) -> None:
        """Blocks until the save in the background is complete, then lets old checkpoints go."""
        if self._pending is None:
            return
        with self._explained(self._pending):
            self._orbax.wait_until_finished()
        step, self._pending = self._pending, None
        if _is_primary():
            self._remove(f"{step:08d}.replaced")
            steps = self.steps()
            for old in sorted(set(steps) - self.policy.kept(steps)):
                self._remove(self._move(old, "deleted"))

    def close(self) -> None:
        """Completes what is under way; the run's last checkpoint is whole when this returns."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                orbax, self._orbax = self._orbax, None
                orbax.close()

    # Restoring -------------------------------------------------------------------------------

    def restore_latest(
        self, abstract_state: Any, *, before: int | None = None, partial: bool = False
    ) -> Restored | None:
        """The newest checkpoint that reads back bit for bit.

        A torn or corrupted one is named in a log line and the one before is tried; once a good one
        is found, the bad ones are renamed to `.corrupt`.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings (rules.abstract_state),
                of any mesh.
            before: only steps below this one (to roll back).
            partial: as for `restore`.

        Returns:
            None when there is no checkpoint.

        Raises:
            CheckpointError: the newest is of another model, or none of several reads back.
        """
        self.wait()
        steps = [step for step in self.steps() if before is None or step < before]
        bad: list[int] = []
        for step in reversed(steps):
            try:
                restored = self._restore(step, abstract_state, partial)
            except Damaged as error:
                self._log(f"checkpoint {step} is damaged ({error}): trying the one before it")
                bad.append(step)
                continue
            if not self.read_only:
                for damaged in bad:
                    self._log(f"set aside as {self._move(damaged, 'corrupt')}")
            return restored
        if bad:
            raise CheckpointError(
                f"none of the checkpoints {', '.join(map(str, sorted(bad)))} in {self.directory} "
                "reads back: move them away to start from step 0, or put a copy in their place"
            )
        return None

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> Restored:
        """One step's state, or a part of it.

        Args:
            abstract_state: as for `restore_latest`.
            step: completed updates; None = the newest that reads back.
            partial: `abstract_state` has only some of the state's top-level parts, such as
                {"params": ...} for a warm start; only these are read. Each must match whole.

        Raises:
            CheckpointError: no such step, damaged, or of another model.
        """
        self.wait()
        if step is None and (newest := self.restore_latest(abstract_state, partial=partial)):
            return newest
        if step is None or step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            which = "" if step is None else f" of step {step}"
            raise CheckpointError(f"no checkpoint{which} in {self.directory}: have {have}")
        try:
            return self._restore(step, abstract_state, partial)
        except Damaged as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is damaged ({error}): use another step"
            ) from None

    def _restore(self, step: int, abstract_state: Any, partial: bool) -> Restored:
        document = self._read_document(step)
        self._check_same_model(step, document["leaves"], named_leaves(abstract_state), partial)
        state = self._collective(lambda: self._read_state(step, abstract_state, partial))
        for name, value in state_digest(state).items():
            if value != document["leaves"][name]["digest"]:
                raise Damaged(f"{name} does not have the bits that were saved")
        return Restored(step, state, document["metadata"])

    def _read_state(self, step: int, abstract_state: Any, partial: bool) -> Any:
        import jax
        import orbax.checkpoint as ocp

        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = nest(
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
                ),
                abstract_state,
            )
        )
        args = self._args
        restore = args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=partial,
        )
        composite = args.Composite(state=restore)
        return unnest(
            self._checkpointer().restore(self._path(step), args=composite).state, abstract_state
        )

    def _read_document(self, step: int) -> dict[str, Any]:
        """The JSON item, checked against its own checksum."""

        def read() -> dict[str, Any]:
            args = self._args
            restored = self._checkpointer().restore(
                self._path(step), args=args.Composite(metadata=args.JsonRestore())
            )
            document = restored.metadata
            if document is None:
                raise FileNotFoundError("its metadata is missing")
            if document.pop("checksum", None) != _checksum(document):
                raise ValueError("its metadata fails its checksum")
            return document

        document = self._collective(read)
        if document["format"] != _FORMAT:
            raise CheckpointError(
                f"{self._path(step)} has checkpoint format {document['format']}, this lcl reads "
                f"format {_FORMAT}: use the lcl that wrote it"
            )
        return document

    def _check_same_model(
        self, step: int, saved: dict[str, Any], wanted: dict[str, Any], partial: bool
    ) -> None:
        """Refuses by name: the first leaf that differs, in the order of the state."""
        difference = None
        for name, leaf in wanted.items():
            if name not in saved:
                difference = f"{name} is not in it"
            elif saved[name]["array"] != describe(leaf):
                difference = f"{name} is {saved[name]['array']} there and {describe(leaf)} here"
            if difference:
                break
        parts = {name.split("/")[0] for name in wanted}
        extra = [
            name
            for name in saved
            if name not in wanted and (not partial or name.split("/")[0] in parts)
        ]
        if not difference and extra:
            difference = f"it has {extra[0]}, which this model has not"
        if difference:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another model: {difference}; "
                "use the configuration it was made with, or another --run_dir"
            )

    # Below: files and Orbax --------------------------------------------------------------------

    @property
    def _args(self) -> Any:
        import orbax.checkpoint as ocp

        return ocp.args

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            handler = ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
            )
            self._orbax = ocp.AsyncCheckpointer(handler)
        return self._orbax

    def _path(self, step: int) -> Any:
        return self.directory / f"{step:08d}"

    def _same_bits(self, step: int, document: dict[str, Any]) -> bool:
        try:
            return self._read_document(step)["leaves"] == document["leaves"]
        except Damaged:
            return False

    def _move(self, step: int, why: str) -> str:
        """Renames a checkpoint's directory to NAME.why, numbered if taken; returns that name."""
        name = f"{step:08d}.{why}"
        if not _is_primary():
            return name
        number = 1
        while (self.directory / name).exists():
            number += 1
            name = f"{step:08d}.{why}-{number}"
        self._path(step).rename(self.directory / name)
        return name

    def _remove(self, name: str) -> None:
        path = self.directory / name
        if path.exists():
            path.rmtree()

    def _open_for_writing(self) -> None:
        """Makes the directory, proves that it can be written, sweeps up after a killed writer."""
        if not _is_primary():
            return
        probe = self.directory / f".probe-{uuid.uuid4().hex}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"can't write checkpoints in {self.directory} ({reason(error)}): "
                "mend its permissions, or give another --run_dir"
            ) from None
        for path in self.directory.iterdir():
            step, _, why = path.name.partition(".")
            if why == "replaced" and not (self.directory / step).exists():
                path.rename(self.directory / step)  # its successor was never completed
            elif why.startswith(("orbax-checkpoint-tmp", "deleted", "replaced")):
                path.rmtree()

    def _explained(self, step: int) -> _Explained:
        return _Explained(self, step)

    def _collective(self, read: Callable[[], Any]) -> Any:
        """Runs a read on all processes; one failure is Damaged on all: they fall back together."""
        failure: Exception | None = None
        result = None
        try:
            result = read()
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for bad files
            if "RESOURCE_EXHAUSTED" in str(error):
                raise  # the devices are too small for it; the files may be fine
            failure = error
        if not _all_agree(failure is None):
            raise Damaged(reason(failure) if failure else "another process could not read it")
        return result


class _Explained:
    """Turns what goes wrong while saving into one CheckpointError, and tidies up after it."""

    def __init__(self, checkpointer: Checkpointer, step: int):
        self.checkpointer, self.step = checkpointer, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return
        checkpointer = self.checkpointer
        checkpointer._pending = None
        try:
            # frees the half-written files, puts a replaced checkpoint back
            checkpointer._open_for_writing()
            intact = ", ".join(map(str, checkpointer.steps())) or "none"
        except (OSError, ValueError):
            intact = "unknown"
        raise CheckpointError(
            f"checkpoint {self.step} could not be written to {checkpointer.directory} "
            f"({reason(error)}): {mend(error)}; intact checkpoints: {intact}"
        ) from error


def _document(step: int, state: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON item: each leaf's array and digest, the caller's metadata, a checksum over all."""
    digests = state_digest(state)
    document = {
        "format": _FORMAT,
        "step": step,
        "leaves": {
            name: {"array": describe(leaf), "digest": digests[name]}
            for name, leaf in named_leaves(state).items()
        },
        "metadata": metadata,
    }
    document = json.loads(json.dumps(document))  # tuples become lists now, as they will on reading
    return {**document, "checksum": _checksum(document)}


def _checksum(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _is_primary() -> bool:
    import jax

    return jax.process_index() == 0


def _all_agree(ok: bool) -> bool:
    """Whether it went well on every process."""
    import jax

    if jax.process_count() == 1:
        return ok
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([ok])).all())
