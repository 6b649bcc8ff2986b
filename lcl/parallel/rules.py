"""Which array dim lies on which mesh axis: ONE list, and the functions that read it.

Models name the dims of their parameters ("embed", "mlp", ...) and never a mesh axis; this list says
where a name goes. So any parameter's sharding can be read off here, and another layout is another
list.

    parameter  mlp/kernel  ("layers", "embed", "mlp")
                               |         |       |
    rules                    None  fsdp,context  tensor  ->  P(None, ("fsdp", "context"), "tensor")

A parameter's "embed" is cut over `fsdp` and over `context` (ZeRO-3 over both: gathered just before
use, its gradient reduce-scattered). Chips that share a row of tokens hold different tokens, so to
the parameters they are what chips with different rows are; left out, 64 chips that share one
row of a million tokens would each keep the whole model and its moments.

Activations have names of their own where they must lie differently: the residual stream's embed dim
is not cut, because its batch and sequence dims already take `fsdp` and `context`; were both called
"embed", the result would hang on the order in which conflicts are settled. "activation_embed" ->
None keeps the residual stream whole on every chip of a tensor group (Megatron's plain form): one
all-reduce a block, no gather before each norm. Sequence-parallel norms would say "tensor" here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # batches and activations
    ("batch", ("data", "fsdp")),
    ("sequence", "context"),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_head_dim", None),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
    # parameters (and optimizer moments, which carry the names of their parameters)
    ("vocab", "tensor"),
    ("embed", ("fsdp", "context")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("norm", None),
    ("layers", None),
)


def replace_rules(rules: Rules = LOGICAL_AXIS_RULES, **changes: Any) -> Rules:
    """The list with some names sent elsewhere; an unknown name is an error, not a new rule.

    Example:
        >>> dict(replace_rules(embed=None))["embed"] is None
        True
    """
    known = dict(rules)
    for name in changes:
        if name not in known:
            raise ValueError(f"no logical axis {name!r} to replace{_nearest(name, list(known))}")
    return tuple((name, changes.get(name, axes)) for name, axes in rules)


def axes_of(name: str, rules: Rules = LOGICAL_AXIS_RULES) -> tuple[str, ...]:
    """The mesh axes that a logical axis is cut over, the slowest first; none for a whole dim.

    Example:
        >>> axes_of("embed"), axes_of("mlp"), axes_of("norm")
        (('fsdp', 'context'), ('tensor',), ())
    """
    axes = dict(rules)[name]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def mesh_spec(names: Sequence[str | None], rules: Rules = LOGICAL_AXIS_RULES) -> PartitionSpec:
    """The PartitionSpec of an array whose dims have these logical names (None = not split).

    Raises:
        ValueError: a name that no rule knows, or two dims that want the same mesh axis.

    Example:
        >>> import jax
        >>> mesh_spec(("layers", "embed", "mlp")) == jax.P(None, ("fsdp", "context"), "tensor")
        True
    """
    from jax.sharding import PartitionSpec

    table, entries = dict(rules), []
    taken: dict[str, str | None] = {}
    for name in names:
        if name is not None and name not in table:
            raise ValueError(
                f"logical axis {name!r} is in no rule{_nearest(name, list(table))}; "
                "name it in lcl/parallel/rules.py"
            )
        axes = None if name is None else table[name]
        for axis in (axes,) if isinstance(axes, str) else (axes or ()):
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array both want mesh axis "
                    f"{axis!r}: give one of them a name of its own in lcl/parallel/rules.py"
                )
            taken[axis] = name
        entries.append(axes)
    return PartitionSpec(*entries)


def state_shardings(tree: Any, mesh: Mesh, rules: Rules = LOGICAL_AXIS_RULES) -> Any:
    """The NamedSharding of every leaf of a state whose parameters carry logical names.

    Args:
        tree: `jax.eval_shape(init_state)`: any pytree, with flax boxes
            (`nn.LogicallyPartitioned`) anywhere. `optax`'s init maps over boxed parameters, so
            moments arrive boxed too and lie where their parameters lie. An array without a box
            (a count, a step) is replicated.
        mesh: the mesh of MeshConfig.build.
        rules: LOGICAL_AXIS_RULES, or another list.

    Returns:
        The same tree without boxes, a NamedSharding at every array.

    Raises:
        ValueError: a dim that its mesh axes do not divide (`num_kv_heads` 2 on `tensor` 4, say):
        replicating it
            silently would cost memory and break the attention kernels' split by heads, so it is
            refused.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def one(path: Any, leaf: Any) -> Any:
        if not _is_box(leaf):
            return NamedSharding(mesh, PartitionSpec())
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        (array,) = jax.tree.leaves(leaf)
        if len(leaf.names) != len(array.shape):
            raise ValueError(
                f"{where} has shape {tuple(array.shape)} but {len(leaf.names)} logical axes "
                f"{tuple(leaf.names)}: name every dim (None for one that is never split)"
            )
        spec = mesh_spec(leaf.names, rules)
        _check_divides(where, leaf.names, array.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_box)


def unbox(tree: Any) -> Any:
    """The tree without flax's metadata boxes: plain arrays (or ShapeDtypeStructs)."""
    import jax

    return jax.tree.map(
        lambda leaf: jax.tree.leaves(leaf)[0] if _is_box(leaf) else leaf, tree, is_leaf=_is_box
    )


def abstract_state(tree: Any, mesh: Mesh, rules: Rules = LOGICAL_AXIS_RULES) -> Any:
    """Shapes, dtypes and shardings in one tree: what a restore needs, and an ahead-of-time compile.

    Args:
        tree: as for `state_shardings`.
        mesh: the mesh.
        rules: LOGICAL_AXIS_RULES, or another list.

    Returns:
        The tree without boxes, a `jax.ShapeDtypeStruct` with its NamedSharding at every array.
    """
    import jax

    shardings = state_shardings(tree, mesh, rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(tree),
        shardings,
    )


def sharding_dump(tree: Any, rules: Rules = LOGICAL_AXIS_RULES) -> dict[str, Any]:
    """Every leaf's shape and PartitionSpec by path, mesh-independent: for golden files and for
    reading.

    Returns:
        {"params/layers/mlp/up/kernel":
            {"shape": [2, 64, 176], "spec": [null, ["fsdp", "context"], "tensor"]}, ...}
    """
    import jax

    dump: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        spec = mesh_spec(leaf.names, rules) if _is_box(leaf) else ()
        (array,) = jax.tree.leaves(leaf)
        dump[jax.tree_util.keystr(path, simple=True, separator="/")] = {
            "shape": list(array.shape),
            "spec": [list(entry) if isinstance(entry, tuple) else entry for entry in spec],
        }
    return dump


def dumps(dump: dict[str, Any]) -> str:
    """A sharding dump as text with one leaf a line, so that a golden file's diff reads well."""
    lines = [f"  {json.dumps(path)}: {json.dumps(value)}" for path, value in sorted(dump.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a [batch, sequence] array lies: rows over data and fsdp, tokens over context."""
    from jax.sharding import NamedSharding

    return NamedSharding(mesh, mesh_spec(("batch", "sequence")))


def check_batch_shape(mesh: Mesh, batch_size: int, sequence_length: int) -> None:
    """Refuses a batch that the mesh can't split evenly, when the config is built rather than at
    trace time.

    Raises:
        ValueError: names the size, the degree and the nearest sizes that fit.
    """
    rows, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if batch_size % rows:
        low = batch_size // rows * rows
        fits = f"{low} or {low + rows}" if low else f"{rows}"
        raise ValueError(
            f"batch of {batch_size} rows does not split over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {rows} devices: use {fits} rows, or another mesh"
        )
    if sequence_length % context:
        low = sequence_length // context * context
        fits = f"{low} or {low + context}" if low else f"{context}"
        raise ValueError(
            f"rows of {sequence_length} tokens do not split over context {context}: use {fits} "
            "tokens, or another mesh"
        )


def check_model_splits(config: Any, mesh: Mesh) -> None:
    """Refuses a model whose dims the mesh can't split, when the config is built.

    Keys and values are never replicated silently when `num_kv_heads` is too small for `tensor`: it
    would cost memory, and a chip's query heads would no longer sit beside their own keys. Nor is a
    parameter left whole whose `embed_dim` the product of `fsdp` and `context` does not divide.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.
        mesh: the mesh.

    Raises:
        ValueError: names the field, its value, the degree and the degrees that fit.
    """
    over_tensor = ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
    fields = [(name, ("tensor",)) for name in over_tensor]
    for name, axes in [*fields, ("embed_dim", axes_of("embed"))]:
        size, degree = getattr(config, name), int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % degree:
            # An axis of size 1 is not part of the trouble; naming it would only mislead.
            split = [axis for axis in axes if mesh.shape[axis] > 1]
            fits = ", ".join(str(d) for d in range(1, degree + 1) if size % d == 0)
            if len(split) == 1:
                raise ValueError(
                    f"{name} = {size} does not split over {split[0]} = {degree}: set mesh "
                    f"{split[0]} to one of {fits}, or change {name}"
                )
            product = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in split)
            raise ValueError(
                f"{name} = {size} does not split over {product} = {degree}: choose sizes of "
                f"{' and '.join(split)} whose product is one of {fits}, or change {name}"
            )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray | None:
    """Which rows of the global batch this process's devices hold.

    Returns:
        None when it holds all of them (one process), else sorted int64 row numbers.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return None
    length = mesh.shape["context"]
    held = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size, length)).values():
        assert index is not None
        held[index[0]] = True
    return np.flatnonzero(held)


def put_batch(
    batch: Any, mesh: Mesh, *, rows: np.ndarray | None = None, batch_size: int | None = None
) -> Any:
    """Host arrays [B, T] become global device arrays, split as the rules say.

        process 0 built rows 0 1        device 0: row 0   device 1: row 1
        process 1 built rows 2 3   ->   device 2: row 2   device 3: row 3   = one array [4, T]

    Args:
        batch: pytree of NumPy arrays [B, T] (None stays None); B is the whole batch, or the
            number of `rows`.
        mesh: the mesh.
        rows: the global row number of each row of `batch` (see `process_rows`); None = all of
            them, in order.
        batch_size: rows of the global batch; needed with `rows`.

    Returns:
        The same pytree of `jax.Array`s [batch_size, T], sharded by `batch_sharding(mesh)`.
    """
    import jax

    leaves = jax.tree.leaves(batch)
    num_rows, length = leaves[0].shape
    check_batch_shape(mesh, num_rows if batch_size is None else batch_size, length)
    sharding = batch_sharding(mesh)
    if rows is None:
        if sharding.is_fully_addressable:
            return jax.device_put(batch, sharding)
        rows, batch_size = np.arange(num_rows), num_rows
    if batch_size is None:
        raise ValueError(
            "put_batch got rows without batch_size: give the rows of the whole batch too"
        )
    place = np.full(batch_size, -1)
    place[rows] = np.arange(len(rows))

    def globalise(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            here = place[index[0]]
            assert (here >= 0).all(), "this process was not given a row that its devices hold"
            return local[here][:, index[1]]

        return jax.make_array_from_callback((batch_size, length), sharding, shard)

    return jax.tree.map(globalise, batch)


def global_batch(stream: Any, step: int, mesh: Mesh) -> Any:
    """Batch `step` of the stream on the mesh; every process builds only the rows its devices hold.

    Args:
        stream: has `batch_shape(step) -> (B, T)` and `batch(step, rows)`, pure in both.
        step: the number of the update, from 0.
        mesh: the mesh.
    """
    batch_size, _ = stream.batch_shape(step)
    rows = process_rows(mesh, batch_size)
    return put_batch(stream.batch(step, rows), mesh, rows=rows, batch_size=batch_size)


def _is_box(leaf: Any) -> bool:
    """Whether this node is one of flax's partitioning boxes: a pytree node with `names`."""
    from flax.core import meta

    return isinstance(leaf, meta.AxisMetadata) and hasattr(leaf, "names")


def _check_divides(
    where: str, names: Sequence[str | None], shape: Sequence[int], spec: Any, mesh: Mesh
) -> None:
    for name, size, axes in zip(names, shape, spec, strict=True):
        axes = [axes] if isinstance(axes, str) else list(axes or [])
        degree = int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))
        if size % degree:
            raise ValueError(
                f"{where}: {name} of {size} does not split over mesh axis {' x '.join(axes)} = "
                f"{degree}: choose a degree that divides {size}, or another {name} size"
            )


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (nearest: {close[0]!r})" if close else f" (known: {', '.join(known)})"
