"""`lcl compile`: the real train step of a configuration, compiled for a pod that is not there.

    gin file -> model, objective, optimizer, mesh, stage   (as `lcl train` reads them)
             -> topology -> step -> compiled -> bytes, collectives, FLOPs, roofline -> report

No store and no corpus is opened: the step depends on a batch's shape alone.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lcl import files
from lcl.parallel import flops, roofline
from lcl.parallel import memory_table as tables
from lcl.parallel.topologies import (
    NEEDS_LIBTPU,
    Topology,
    libtpu_installed,
    parse_topology,
    topology_devices,
)

__all__ = ["compile"]
CONFIGURABLES = ("compile",)


def compile(  # the word of the command line
    *,
    topology: str,
    train: Mapping[str, Any],
    title: str = "train step",
    stage: str | None = None,
    compiler_options: Mapping[str, str] | None = None,
    anchor: Mapping[str, Any] | None = None,
    abstract: bool = False,
    num_layers: int | None = None,
    save: str | None = None,
    hlo: str | None = None,
) -> dict[str, Any]:
    """Compiles a run's train step for a topology and says what the compiler knows of it.

    Args:
        topology: a name such as "v5p-128" or "2x v5e-256"; see `lcl.parallel.topologies`.
        train: the arguments of `lcl.train.train`, of which model, objective, optimizer, mesh and
            stages are used.
        title: what the report is called.
        stage: which stage; None takes the one with the longest rows, and the most of them.
        compiler_options: XLA flags for this program.
        anchor: someone else's figures for the same work, printed beside ours: {"name": ...} and any
            of argument, output, temp, peak, collective (bytes a chip), lowering_s, compile_s.
        abstract: no compilation and no libtpu: the table of bytes from shapes alone.
        num_layers: compile with so many scanned layers, and say what all of them would take.
        save: a file for the executable.
        hlo: a file for the compiled program's text.

    Returns:
        The report, JSON through and through; `compile_report.report_text` prints it.

    Raises:
        ValueError: an unknown topology, no libtpu, or sizes that do not fit, in one line.
    """
    slice_ = parse_topology(topology)
    if not abstract and not libtpu_installed():
        raise ValueError(NEEDS_LIBTPU)
    chosen = _choose_stage(train["stages"], stage)
    work = _Work.of(train, chosen, slice_, abstract)
    whole = not abstract and (num_layers is None or num_layers >= work.model.num_layers)
    if (save or hlo) and not whole:
        how = "--abstract" if abstract else f"--layers {num_layers}"
        raise ValueError(
            f"{how} compiles no whole program, so there is none for --save or --hlo: leave one out"
        )
    report = work.describe(title)
    report["anchor"] = dict(anchor) if anchor else None
    if abstract:
        return report
    if whole:
        work.compile_into(report, compiler_options, save, hlo)
    else:
        assert num_layers is not None
        _extrapolate(work, report, compiler_options, num_layers)
    return report


def largest_stage(stages: Sequence[Any]) -> Any:
    """The stage of the longest rows; of several such, the first of the most rows a step."""
    return max(stages, key=lambda one: (one.data.sequence_length, rows_a_step(stages, one)))


def rows_a_step(stages: Sequence[Any], stage: Any) -> int:
    """Rows of a step of a stage, the replayed ones included; the first stage replays nothing.

    Args:
        stages: of the run.
        stage: one of them.
    """
    data = stage.data
    if data.replay is None or stage is stages[0]:
        return data.batch_size
    return sum(data.replay.rows_per_step(data.batch_size))


def _choose_stage(stages: Sequence[Any], name: str | None) -> Any:
    if name is None:
        return largest_stage(stages)
    for one in stages:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in stages)
    raise ValueError(f"there is no stage {name!r}; there is {known}")


@dataclasses.dataclass(frozen=True)
class _Work:
    """One program to compile, and all that is known of it beforehand."""

    topology: Topology
    model: Any
    objective: Any
    optimizer: Any
    mesh_config: Any
    mesh: Any
    batch_shape: tuple[int, int]
    num_sources: int
    stage: str

    @classmethod
    def of(cls, train: Mapping[str, Any], stage: Any, topology: Topology, abstract: bool) -> _Work:
        model = train["model"]
        if stage.rope is not None:
            model = dataclasses.replace(model, rope=stage.rope)
        data = stage.data
        batch_shape = rows_a_step(train["stages"], stage), data.sequence_length
        if data.decomposition is not None:  # the longest rows, as many as hold the same tokens
            longest = max(data.decomposition.row_lengths)
            batch_shape = max(1, data.batch_size * data.sequence_length // longest), longest
        config = train["mesh"]
        if abstract:
            mesh: Any = _abstract_mesh(config, topology)
        else:
            mesh = config.build(topology_devices(topology))
        domains = {domain for one in train["stages"] for domain in one.data.mixture.domains}
        return cls(
            topology, model, train["objective"], train["optimizer"], config, mesh, batch_shape,
            2 * len(domains), stage.name,
        )  # fmt: skip

    def step(self) -> tuple[Any, tuple[Any, Any]]:
        """The jitted step and its arguments' shapes; checked, nothing is traced yet."""
        from lcl.programs import abstract_step

        return abstract_step(
            self.model,
            self.objective,
            self.optimizer,
            self.mesh,
            self.batch_shape,
            context_layout=self.mesh_config.context_layout,
            num_sources=self.num_sources,
        )

    def describe(self, name: str) -> dict[str, Any]:
        """The report before anything is compiled."""
        from lcl.checkpoints.run_card import versions
        from lcl.objectives import cross_entropy
        from lcl.parallel import compile_report

        model, (rows, length) = self.model, self.batch_shape
        _, (state, batch) = self.step()
        kept, offloaded = self._remat()
        table = tables.memory_table(
            model,
            params=state.params,
            opt_state=state.opt_state,
            batch=batch,
            mesh_shape=self.mesh.shape,
            batch_shape=self.batch_shape,
            kept=kept,
            offloaded=offloaded,
            whole_head_bytes=cross_entropy.WHOLE_HEAD_BYTES,
            head_chunk_bytes=cross_entropy.HEAD_CHUNK_BYTES,
            loss_chunk=getattr(self._loss, "chunk_size", 512),
            accumulate=getattr(self.objective, "pieces", 1),
        )
        all_kept = None if kept is None else {*kept, *offloaded}
        executed, words = roofline.executed_flops_per_token(model, length, all_kept)
        tokens = rows * length
        mesh = {axis: int(size) for axis, size in self.mesh.shape.items()}
        return {
            "name": name,
            "what": [
                f"topology {self.topology}",
                "mesh " + " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
                f"batch {rows} x {length:,} tokens, stage {self.stage!r}",
                f"model of {model.num_layers} layers, {model.embed_dim} wide; remat "
                f"{model.remat!r}, attention {model.attention!r}, layout "
                f"{self.mesh_config.context_layout!r}, residual stream {model.residual_dtype}",
            ],
            "versions": {k: v for k, v in versions().items() if k in ("lcl", "jax", "libtpu")},
            "topology": dataclasses.asdict(self.topology) | {"devices": self.topology.num_devices},
            "mesh": mesh,
            "batch": [rows, length],
            "hbm_bytes": self.topology.chip.hbm_bytes,
            "verdict": f"From shapes alone: about {compile_report.gb(table.peak)} of "
            f"{compile_report.gb(self.topology.chip.hbm_bytes)} a chip.",
            "memory": {},
            "arguments": {
                "parameters": table.rows["parameters"],
                "moments": table.rows["moments"],
                "batch": table.rows["batch"],
            },
            "table": {"rows": dict(table.rows), "peak": table.peak, "host": table.host},
            "buffers": [],
            "collectives": [],
            "collective_bytes": 0,
            "kernels": 0,
            "flops": {
                "model": tokens * flops.train_flops_per_token(model, length),
                "executed": tokens * executed,
                "convention": flops.CONVENTION + "; one causal document a row",
                "executed_convention": words,
            },
            "roofline": None,
            "seconds": {},
            "remarks": [],
        }

    @property
    def _loss(self) -> Any:
        """The loss itself, out of whatever wraps it."""
        return getattr(self.objective, "objective", self.objective)

    def _remat(self) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        from lcl.models.remat import OFFLOADED, REMAT_POLICIES

        return REMAT_POLICIES[self.model.remat], OFFLOADED.get(self.model.remat, ())

    def compile_into(
        self,
        report: dict[str, Any],
        options: Mapping[str, str] | None,
        save: str | None = None,
        hlo: str | None = None,
    ) -> None:
        """Compiles, and writes what was found into the report."""
        from lcl.parallel import ahead_of_time, collectives, compile_report

        jitted, arguments = self.step()
        compiled = ahead_of_time.compile_step(
            jitted, arguments, self.mesh, compiler_options=options
        )
        report["seconds"] = {
            "lowering": round(compiled.lowering_s, 1),
            "compile": round(compiled.compile_s, 1),
        }
        report["what"].append(
            f"lowered in {compiled.lowering_s:.1f} s, compiled in {compiled.compile_s:.1f} s, by "
            + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        )
        if compiled.out_of_memory is not None:
            self._refused(report, compiled.out_of_memory)
            return
        found, remarks = collectives.find_collectives(
            compiled.text, self.mesh.shape, num_slices=self.topology.num_slices
        )
        report["memory"] = compiled.memory
        peak, hbm = compiled.memory["peak"], self.topology.chip.hbm_bytes
        assert hbm is not None
        report["verdict"] = (
            f"It fits: {compile_report.gb(peak)} of {compile_report.gb(hbm)} a chip "
            f"({peak / hbm:.0%}) at the peak."
        )
        report["buffers"] = compile_report.largest_buffers(compiled.text)
        report["collectives"] = compile_report.group_collectives(found)
        report["collective_bytes"] = int(sum(one.total_sent for one in found))
        report["kernels"] = collectives.count_kernels(compiled.text)
        report["flops"]["compiler"] = compiled.flops
        report["remarks"] += remarks
        report["roofline"] = compile_report.as_dict(self._bounds(report, found))
        if hlo:
            pathlib.Path(hlo).write_text(compiled.text)
        if save:
            ahead_of_time.save_executable(compiled, pathlib.Path(save), report)

    def _refused(self, report: dict[str, Any], refusal: Any) -> None:
        from lcl.parallel import compile_report

        wanted, there = refusal.wanted_bytes, refusal.available_bytes
        sizes = ""
        if wanted is not None:
            sizes = f": {compile_report.gb(wanted)} wanted, {compile_report.gb(there)} there"
        settings = {
            "batch_size": self.batch_shape[0],
            "mesh": report["mesh"],
            "remat": self.model.remat,
            "residual_dtype": self.model.residual_dtype,
            "num_slices": self.topology.num_slices,
        }
        report["verdict"] = f"It does NOT fit{sizes}."
        report["out_of_memory"] = compile_report.as_dict(refusal)
        report["buffers"] = [
            {"bytes": one.num_bytes, "shape": one.shape, "op": compile_report.short_op(one.op)}
            for one in refusal.buffers
        ]
        report["remarks"] += [
            f"to make it fit: {text}" for text in compile_report.advice(refusal, settings)
        ]

    def _bounds(self, report: Mapping[str, Any], found: Sequence[Any]) -> roofline.Roofline:
        model, rows = self.model, report["table"]["rows"]
        width = {"float32": 4, "bfloat16": 2}[model.dtype]
        weights = flops.matmul_parameters(model)["total"] * width // self.mesh.shape["tensor"]
        traffic = roofline.hbm_bytes(
            state_bytes=rows["parameters"] + rows["moments"],
            parameter_bytes=rows["parameters"],
            layer_weight_bytes=weights,
            kept_bytes=rows["kept"],
            num_passes=2 if model.remat == "none" else 3,
        )
        batch, length = self.batch_shape
        return roofline.roofline(
            self.topology.chip,
            num_devices=self.topology.num_devices,
            tokens=batch * length,
            model_flops=report["flops"]["model"],
            executed_flops=report["flops"]["executed"],
            hbm_bytes=traffic,
            collectives=found,
            host_bytes=report["table"]["host"],
        )


def _extrapolate(
    work: _Work, report: dict[str, Any], options: Mapping[str, str] | None, num_layers: int
) -> None:
    """Compiles with n and 2n layers and continues the line to all of them.

    Every byte of a scanned step is a constant and so much a layer, so two points give the line.
    """
    from lcl.parallel import compile_report

    reports = []
    for layers in (num_layers, 2 * num_layers):
        part = dataclasses.replace(work, model=dataclasses.replace(work.model, num_layers=layers))
        one = part.describe(report["name"])
        part.compile_into(one, options)
        if not one["memory"]:
            report.update(verdict=f"With {layers} layers already: {one['verdict']}")
            report["remarks"] += one["remarks"]
            report["buffers"] = one["buffers"]
            return
        reports.append(one)
    few, more = reports
    factor = (work.model.num_layers - num_layers) / num_layers

    def line(a: float, b: float) -> int:
        return int(a + (b - a) * factor)

    report["memory"] = {k: line(few["memory"][k], more["memory"][k]) for k in few["memory"]}
    report["collective_bytes"] = line(few["collective_bytes"], more["collective_bytes"])
    pairs = {(g["kind"], g["axes"], g["op"]): g for g in more["collectives"]}
    for group in few["collectives"]:
        other = pairs.get((group["kind"], group["axes"], group["op"]), group)
        for key in ("times", "sent_bytes", "dcn_bytes"):
            group[key] = line(group[key], other[key])
    report["collectives"] = few["collectives"]
    report["buffers"], report["kernels"] = more["buffers"], more["kernels"]

    def at(key: str) -> float:
        return few["roofline"][key] + (more["roofline"][key] - few["roofline"][key]) * factor

    bounds = roofline.bounded(
        {name: at(f"{name.lower()}_s") for name in roofline.RESOURCES},
        ici_one_link_s=at("ici_one_link_s"),
        chip=work.topology.chip,
        num_devices=work.topology.num_devices,
        tokens=work.batch_shape[0] * work.batch_shape[1],
        model_flops=report["flops"]["model"],
    )
    report["roofline"] = compile_report.as_dict(bounds)
    report["seconds"] = more["seconds"]
    report["remarks"] += few["remarks"] + [
        f"EXTRAPOLATED: compiled with {num_layers} and {2 * num_layers} scanned layers, continued "
        f"along the line to {work.model.num_layers}; the largest arrays and the seconds are those "
        f"of {2 * num_layers} layers"
    ]
    top, hbm = report["memory"]["peak"], work.topology.chip.hbm_bytes
    assert hbm is not None
    fits = "It fits" if top <= hbm else "It does NOT fit"
    report["verdict"] = (
        f"{fits}, extrapolated: {compile_report.gb(top)} of {compile_report.gb(hbm)} a chip "
        f"({top / hbm:.0%}) at the peak."
    )


def _abstract_mesh(config: Any, topology: Topology) -> Any:
    """A mesh of the topology's size and kind without any device: shapes can be laid out on it."""
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from lcl.parallel import MeshConfig
    from lcl.parallel.mesh import AXES

    sizes = config.sizes(topology.num_devices)
    here = MeshConfig().build(jax.devices()[:1]).abstract_mesh.abstract_device
    there = dataclasses.replace(here, device_kind=topology.device_kind, platform="tpu")
    return AbstractMesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        abstract_device=there,
    )


def write_report(report: Mapping[str, Any], folder: str, stem: str) -> list[pathlib.Path]:
    """Writes STEM.json and STEM.md into the folder."""
    from lcl.parallel import compile_report

    texts = {
        ".json": json.dumps(report, indent=1) + "\n",
        ".md": compile_report.report_text(report),
    }
    paths = [pathlib.Path(folder) / f"{stem}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        files.write_whole(path, text.encode())
    return paths
