"""The real train step compiled for TPUs that are not there: lowering, collectives, bytes a chip.

Two children compile at the same time, which libtpu allows only if it is told to; each prints its
report, and what is asked of it is asked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lcl.parallel.topologies import aot_environment, libtpu_installed
from tests.conftest import REPOSITORY

needs_libtpu = pytest.mark.skipif(
    not libtpu_installed(), reason="libtpu is for Linux on x86-64 only: pip install -e '.[tpu]'"
)

CHILD = """
import json, sys
from lcl import config
from lcl.compile import compile as compile_step
from lcl.parallel import ahead_of_time
import pathlib
files, bindings = [sys.argv[1]], json.loads(sys.argv[2])
settings = config.load(files, bindings)
train = settings.kwargs("train", run_dir="none")
own = settings.kwargs("compile", train=train)
report = compile_step(**own, save=sys.argv[3])
saved = ahead_of_time.read_report(pathlib.Path(sys.argv[3]))
assert saved["memory"] == report["memory"]
print(json.dumps(report))
"""
POD = """\
# A tiny pod for a test.
include 'configs/runs/base.gin'
include 'configs/models/llama.gin'
compile.topology = 'v5e-4'
DecoderConfig.vocab_size = 512
DecoderConfig.num_layers = 2
DecoderConfig.embed_dim = 256
DecoderConfig.mlp_dim = 512
DecoderConfig.num_heads = 2
DecoderConfig.num_kv_heads = 1
DecoderConfig.head_dim = 128
DecoderConfig.remat = 'full'
Data.root = 'none'
train.stages = [@Stage()]
Stage.name = 'tiny'
Stage.steps = 10
StageData.sequence_length = 1024
StageData.batch_size = 4
Mixture.weights = {'any': 1.0}
infinite.peak = 1e-3
infinite.constant = 5e-4
infinite.final = 1e-5
infinite.warmup_steps = 2
infinite.cooldown_steps = 2
"""
SPLASH = ["MeshConfig.data=2", "MeshConfig.fsdp=2", "DecoderConfig.attention='splash'"]
RING = ["MeshConfig.data=1", "MeshConfig.context=4", "DecoderConfig.attention='ring'"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports of splash and ring, compiled by two processes at once."""
    folder = tmp_path_factory.mktemp("compile")
    pod = folder / "pod.gin"
    pod.write_text(POD)
    env = dict(os.environ) | aot_environment(dict(os.environ))
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")])
    children = {}
    for name, bindings in (("splash", SPLASH), ("ring", RING)):
        command = [sys.executable, "-c", CHILD, str(pod), json.dumps(bindings), f"{folder}/{name}"]
        children[name] = subprocess.Popen(
            command, env=env, cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    found = {}
    for name, child in children.items():
        out, err = child.communicate(timeout=900)
        assert child.returncode == 0, f"{name}: {err[-6000:]}"
        found[name] = json.loads(out.splitlines()[-1])
    return found


def kinds_over(report, axis):
    return {g["kind"] for g in report["collectives"] if axis in g["axes"].split("+")}


@needs_libtpu
def test_splash_on_a_data_and_fsdp_mesh(reports):
    report = reports["splash"]
    # forward, and again in the backward pass; then dq and dk, dv
    assert report["kernels"] >= 3
    assert "all-reduce" in kinds_over(report, "data")
    assert kinds_over(report, "fsdp") & {"all-gather", "reduce-scatter"}
    assert not kinds_over(report, "context") and not kinds_over(report, "tensor")
    assert not [g for g in report["collectives"] if g["kind"] == "collective-permute"]
    assert not report["remarks"]


@needs_libtpu
def test_ring_on_a_context_mesh(reports):
    report = reports["ring"]
    assert report["kernels"] >= 3
    permutes = [g for g in report["collectives"] if g["kind"] == "collective-permute"]
    assert {g["axes"] for g in permutes} == {"context"}
    # Keys and values, bfloat16 [1 row of 4, 256 tokens, 1 head, 128], pass on at least 3 times in
    # each of 2 layers, for the forward, its repetition and the backward pass.
    sent = sum(g["sent_bytes"] for g in permutes)
    once = 2 * 4 * 256 * 128 * 2
    assert 2 * 3 * 3 * once <= sent <= 2 * 4 * 8 * once
    assert not report["remarks"]


@needs_libtpu
@pytest.mark.parametrize("name", ["splash", "ring"])
def test_bytes_a_chip_lie_in_a_golden_band(reports, name):
    memory, table = reports[name]["memory"], reports[name]["table"]["rows"]
    state = table["parameters"] + table["moments"] + table["batch"]
    assert memory["argument"] == pytest.approx(state, rel=0.02)
    assert memory["alias"] == pytest.approx(memory["argument"], rel=0.02)  # donated
    # Within a factor: what the compiler fuses, pads (an [N] of 2 heads to 128 lanes) and prefetches
    # is not in the table from shapes.
    ours = reports[name]["table"]["peak"] - state
    assert 0.2 * ours <= memory["temp"] <= 3.0 * ours, (memory, table)
    assert 0.5e6 < memory["peak"] < 40e6


@needs_libtpu
def test_the_bound_is_a_bound(reports):
    for report in reports.values():
        bounds = report["roofline"]
        assert 0 < bounds["mfu"] < 1
        assert bounds["step_s"] == max(bounds[f"{k}_s"] for k in ("compute", "hbm", "ici", "dcn"))


def test_a_topology_unknown_or_too_small_and_no_libtpu_are_one_line(tmp_path, monkeypatch, capsys):
    from lcl import compile as compiling
    from lcl import main

    pod = tmp_path / "pod.gin"
    pod.write_text(POD)

    def refused(*words):
        assert main.main(["compile", f"--gin_file={pod}", *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        return error[0]

    assert "nearest: 'v5e-4'" in refused("--topology=v5e-3")
    assert "there is no stage 'other'; there is tiny" in refused("--stage=other", "--abstract")
    assert "does not divide" in refused("--gin.MeshConfig.fsdp=3", "--abstract")
    assert "--abstract compiles no whole program" in refused("--abstract", "--hlo=none.txt")
    monkeypatch.setattr(compiling, "libtpu_installed", lambda: False)
    assert "pip install -e '.[tpu]'" in refused()


def test_the_table_from_shapes_needs_no_compiler(tmp_path, monkeypatch, capsys):
    from lcl import compile as compiling
    from lcl import main

    monkeypatch.setattr(compiling, "libtpu_installed", lambda: False)
    pod = tmp_path / "pod.gin"
    pod.write_text(POD)
    words = ["--abstract", "--topology=v5p-16", f"--out={tmp_path}"]
    words += ["--gin.MeshConfig.data=2", "--gin.MeshConfig.context=4"]
    assert main.main(["compile", f"--gin_file={pod}", *words]) == 0
    page = capsys.readouterr().out
    assert "8 v5p chips, 2 x 2 x 2" in page and "| moments |" in page
    report = json.loads((tmp_path / "pod_abstract.json").read_text())
    rows = report["table"]["rows"]
    # Matrices lie in four parts over the context axis, norms whole; all of them float32.
    matrices = 2 * 256 * (256 + 2 * 128 + 256 + 3 * 512) + 2 * 512 * 256
    assert rows["parameters"] == 4 * (matrices // 4 + 5 * 256)
    tokens = 4 * 1024 // 8
    assert rows["kept"] == 2 * tokens * 256 * 4  # layers x tokens a chip x width, the inputs only
