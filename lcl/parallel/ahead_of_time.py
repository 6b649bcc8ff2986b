"""Compiles a step for devices that are not there, and says what the compiler knows of it.

    topology -> devices -> mesh -> lower -> compile -> bytes a device, program text, seconds

Speed is the one thing that a compilation cannot tell; roofline.py bounds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)"


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array of the program, as the compiler names it."""

    num_bytes: int
    shape: str
    op: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal, read.

    Attributes:
        wanted_bytes, available_bytes: of a device's memory; None where the text does not say.
        buffers: the largest, biggest first, where the text lists them.
        text: the first line of the message.
    """

    wanted_bytes: int | None
    available_bytes: int | None
    buffers: tuple[Buffer, ...]
    text: str


@dataclasses.dataclass
class Compiled:
    """A program compiled for absent devices, or the reason why there is none.

    Attributes:
        lowering_s, compile_s: seconds on this machine.
        memory: bytes a device by kind: argument, output, alias, temp, code, peak, host_temp, ...;
            empty when the program does not fit.
        text: the optimised, scheduled program; "" when it does not fit.
        flops: the compiler's own count a device (a loop's body once, no Pallas kernel), or None.
        out_of_memory: set when the program does not fit.
        executable: `jax.stages.Compiled`, for `save`.
    """

    lowering_s: float
    compile_s: float
    memory: dict[str, int]
    text: str = ""
    flops: float | None = None
    out_of_memory: OutOfMemory | None = None
    executable: Any = None


def compile_step(
    jitted: Any,
    arguments: Sequence[Any],
    mesh: jax.sharding.Mesh,
    *,
    compiler_options: Mapping[str, str] | None = None,
) -> Compiled:
    """Lowers and compiles for the mesh's devices, real or not.

    Args:
        jitted: a `jax.jit`-ed function.
        arguments: trees of `jax.ShapeDtypeStruct`s with shardings on the mesh.
        mesh: also set as the ambient mesh, by which kernels learn the platform.
        compiler_options: XLA flags for this program, such as
            {"xla_tpu_scoped_vmem_limit_kib": "65536"}.

    Returns:
        The program; a program that is too big is a result, not an error.

    Raises:
        ValueError: what the function itself refuses.
    """
    import jax

    begin = time.monotonic()
    with jax.set_mesh(mesh), _no_cache():
        lowered = jitted.lower(*arguments)
        lowering_s, begin = time.monotonic() - begin, time.monotonic()
        try:
            executable = lowered.compile(compiler_options=dict(compiler_options or {}) or None)
        except jax.errors.JaxRuntimeError as error:
            refusal = read_out_of_memory(str(error))
            if refusal is None:
                raise
            seconds = time.monotonic() - begin
            return Compiled(lowering_s, seconds, {}, out_of_memory=refusal)
    compile_s = time.monotonic() - begin
    return describe_executable(executable, lowering_s, compile_s)


@contextlib.contextmanager
def _no_cache() -> Any:
    """Without the persistent cache: a time to compile that was not spent would be a lie."""
    import jax

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def describe_executable(executable: Any, lowering_s: float, compile_s: float) -> Compiled:
    """What an executable says of itself, as a `Compiled`."""
    stats = executable.memory_analysis()
    kinds = {
        "argument": "argument_size_in_bytes",
        "output": "output_size_in_bytes",
        "alias": "alias_size_in_bytes",
        "temp": "temp_size_in_bytes",
        "code": "generated_code_size_in_bytes",
        "peak": "peak_memory_in_bytes",
        "host_argument": "host_argument_size_in_bytes",
        "host_output": "host_output_size_in_bytes",
        "host_temp": "host_temp_size_in_bytes",
    }
    memory = {kind: int(getattr(stats, name, 0) or 0) for kind, name in kinds.items()}
    cost = executable.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return Compiled(
        lowering_s,
        compile_s,
        memory,
        text=executable.as_text() or "",
        flops=cost.get("flops"),
        executable=executable,
    )


def read_out_of_memory(message: str) -> OutOfMemory | None:
    """Reads the compiler's refusal; None if the message is about something else.

    Example:
        >>> refusal = read_out_of_memory(
        ...     "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        ...     "temporaries (64.00G) exceeds available HBM (15.75G)."
        ... )
        >>> refusal.wanted_bytes / 2**30, refusal.available_bytes / 2**30
        (64.0, 15.75)
    """
    low = message.lower()
    if "resource_exhausted" not in low and "ran out of memory" not in low:
        return None
    pairs = (
        rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
        rf"[Uu]sed {_SIZE} of {_SIZE} hbm",
        rf"{_SIZE} .{{0,80}}exceeds .{{0,80}}?{_SIZE}",
    )
    wanted = available = None
    for pattern in pairs:
        match = re.search(pattern, message)
        if match:
            wanted, available = _bytes(*match.groups()[:2]), _bytes(*match.groups()[2:])
            break
    buffers = []
    # "1. Size: 32.00G  Operator: op_name="..."  Shape: bf16[...]{...}  ..."
    for block in re.split(r"\n\s*\d+\. ", message)[1:]:
        size, shape = re.search(rf"Size: {_SIZE}", block), re.search(r"Shape: (\S+)", block)
        op = re.search(r'op_name="([^"]*)"', block)
        if size:
            name = shape[1].partition("{")[0] if shape else "?"
            buffers.append(Buffer(_bytes(*size.groups()), name, op[1] if op else "?"))
    return OutOfMemory(wanted, available, tuple(buffers), message.strip().splitlines()[0])


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def save_executable(compiled: Compiled, path: pathlib.Path, report: Any = None) -> None:
    """Writes the executable to a file, to be loaded where the real devices are.

    Args:
        compiled: what `compile_step` returned.
        path: the file.
        report: anything JSON-like that should lie beside it; `read_report` reads it anywhere.

    Raises:
        ValueError: there is none, because the program did not fit.
    """
    from jax.experimental import serialize_executable

    if compiled.executable is None:
        raise ValueError("the program does not fit its chips, so there is nothing to save")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    payload, in_tree, out_tree = serialize_executable.serialize(compiled.executable)
    draft.write_bytes(pickle.dumps((_header(), report, payload, in_tree, out_tree)))
    draft.replace(path)


def read_report(path: pathlib.Path) -> Any:
    """The report that was saved beside an executable; needs none of its devices.

    Raises:
        ValueError: no such file, or one of another kind or version.
    """
    return _read_saved(path)[0]


def load_executable(path: pathlib.Path) -> Any:
    """Reads an executable that `save_executable` wrote, to run it: its devices must be here.

    Only files that you made: the format is a pickle, which runs what it holds.

    Args:
        path: the file.

    Returns:
        A `jax.stages.Compiled`.

    Raises:
        ValueError: no such file, one of another version of JAX, or one for devices that are not
            here.
    """
    import jax
    from jax.experimental import serialize_executable

    _, payload, in_tree, out_tree = _read_saved(path)
    try:
        return serialize_executable.deserialize_and_load(payload, in_tree, out_tree)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} does not load on this machine's {jax.default_backend()} devices ({reason}): "
            "load it where the devices are that it was compiled for"
        ) from error


def _read_saved(path: pathlib.Path) -> tuple[Any, Any, Any, Any]:
    try:
        header, *rest = pickle.loads(path.read_bytes())
        kind = header["format"]
    except FileNotFoundError:
        raise ValueError(f"there is no saved executable {path}") from None
    except (pickle.UnpicklingError, ValueError, EOFError, TypeError, KeyError):
        kind = ""
    if kind != _header()["format"]:
        raise ValueError(f"{path} is no executable that `lcl compile --save` wrote")
    if header != _header():
        raise ValueError(
            f"{path} was saved by {header['jax']}, and this is {_header()['jax']}: compile it again"
        )
    report, payload, in_tree, out_tree = rest
    return report, payload, in_tree, out_tree


def _header() -> dict[str, str]:
    import jax

    return {"format": "lcl executable 1", "jax": f"jax {jax.__version__}"}
