"""launch/tpu.py by dry run, and its loop against a `gcloud` of ours."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from lcl.preemption import EXIT_PREEMPTED

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PODS = sorted((REPOSITORY / "configs" / "pods").glob("*_*.gin"))
ZONE = "--zone=us-east5-a"
TRAINING = ("--", "--gin_file=configs/pods/llama3_8b_1m_v5p_32.gin", "--run_dir=/mnt/a b")


def tpu(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "tpu.py"), *words],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(*words: str) -> list[list[str]]:
    """The commands that a dry run prints, parted as a shell would part them."""
    done = tpu(*words[:1], "long", ZONE, "--dry_run", *words[1:])
    assert done.returncode == 0, done.stderr
    return [shlex.split(x) for x in done.stdout.splitlines() if not x.startswith("#")]


def remote(command: list[str]) -> list[str]:
    """The words that a worker's shell makes of the --command of an ssh."""
    (line,) = [word.partition("=")[2] for word in command if word.startswith("--command=")]
    return shlex.split(line)


def test_run_asks_copies_sets_up_starts_and_waits():
    commands = dry("run", "--spot", "--project=p", *TRAINING)
    steps = [" ".join(words[:5]) for words in commands]
    queued = "gcloud compute tpus queued-resources"
    assert steps[:3] == [f"{queued} describe", f"{queued} create", f"{queued} describe"]
    assert {"--node-id=long", "--accelerator-type=v5p-32", "--spot", ZONE, "--project=p"} <= set(
        commands[1]
    )
    assert "--runtime-version=v2-alpha-tpuv5" in commands[1]
    assert commands[3][0] == "git" and commands[4][4] == "scp"
    assert all("--worker=all" in words for words in commands[4:8])
    assert remote(commands[5])[-2:] == ["lcl/launch/worker.sh", "setup"]
    # Quoting survives the two shells between here and lcl: a blank stays in its word.
    assert remote(commands[6]) == ["lcl/launch/worker.sh", "start", "long", *TRAINING[1:]]
    assert remote(commands[7]) == ["lcl/launch/worker.sh", "wait", "long"]


def test_several_slices_are_one_request_and_one_ssh():
    commands = dry("run", "--type=2x v5e-256", *TRAINING)
    assert {"--node-count=2", "--node-prefix=long", "--accelerator-type=v5litepod-256"} <= set(
        commands[1]
    )
    for words in commands[4:8]:
        assert words[3] == "queued-resources" and {"--worker=all", "--node=all"} <= set(words)


def test_a_run_may_live_in_a_bucket():
    (start,) = dry("start", *TRAINING[:2], "--run_dir=gs://bucket/long")
    assert remote(start)[-1] == "--run_dir=gs://bucket/long"


def test_environment_reaches_the_workers_quoted():
    flags = "LIBTPU_INIT_ARGS=--xla_a=true --xla_b='c'"
    (start,) = dry("start", f"--env={flags}", *TRAINING)
    assert remote(start)[0] == flags
    (create,) = dry("xpk", f"--env={flags}", "--cluster=c", "--docker_image=i", *TRAINING)
    assert f"--env={flags}" in create
    assert {"--tpu-type=v5p-32", "--num-slices=1", "--restart-on-user-code-failure"} <= set(create)
    assert remote(create) == ["launch/worker.sh", "run", *TRAINING[1:]]


def test_the_rest_is_one_command_each():
    assert dry("stop", "--type=v5p-8") == [
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "long", "--worker=all", ZONE]
        + ["--command=lcl/launch/worker.sh stop long"]
    ]
    (words,) = dry("delete", "--type=v5p-8")
    assert words[4] == "delete" and {"--force", "--quiet"} <= set(words)
    (words,) = dry("status", "--type=v5p-8")
    assert words[4] == "describe"


@pytest.mark.parametrize("path", PODS, ids=lambda p: p.stem)
def test_every_pod_configuration_names_a_slice(path):
    commands = dry("create", "--", f"--gin_file={path.relative_to(REPOSITORY)}")
    assert any(word.startswith("--accelerator-type=v") for word in commands[1])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("run", "--type=v7-8", *TRAINING), "--type 'v7-8': use a name such as v5e-256"),
        (("run", "--type=v5p-8"), "no configuration: give --gin_file"),
        (("create",), "which slice? Give --type"),
        (("create", "--", "--gin_file=none.gin"), "--gin_file=none.gin: there is no such file"),
        (("run", *TRAINING[:2]), "no --run_dir after --"),
        (("run", *TRAINING[:2], "--run_dir=here"), "--run_dir=here would be another folder"),
        (("create", "--type=2x v5e-256", "--slices=3"), "is 2 slices and --slices=3"),
        (("start", "--env=x", *TRAINING), "--env=x: should be NAME=VALUE"),
        (("xpk", *TRAINING), "xpk needs --cluster=NAME"),
    ],
)
def test_mistakes_are_one_line_with_the_mend(words, text):
    done = tpu(words[0], "long", ZONE, "--dry_run", *words[1:])
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/tpu.py {words[0]}: ")
    assert text in done.stderr and done.stderr.count("\n") == 1


# A gcloud that notes what it is asked for, and answers by what it has noted.
GCLOUD = """
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
script = json.loads((folder / "script.json").read_text())
words = sys.argv[1:]
line = " ".join(words)
kind = "wait" if line.endswith("wait long") else words[3]
with (folder / "asked").open("a") as file:
    file.write(kind + "\\n")
answers = script.get(kind, [""])
n = (folder / "asked").read_text().split().count(kind)
answer = answers[min(n, len(answers)) - 1]
if isinstance(answer, int):
    sys.exit(answer)
print(answer)
"""


def loop(tmp_path, script: dict) -> tuple[int, list[str], str]:
    """`tpu.py run` against the gcloud above: its code, the kinds of commands, its stderr."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!{sys.executable}\n{GCLOUD}")
    gcloud.chmod(0o755)
    (tmp_path / "git").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "git").chmod(0o755)
    (tmp_path / "script.json").write_text(json.dumps(script))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = tpu("run", "long", ZONE, "--poll=0", "--max_restarts=2", *TRAINING, env={"PATH": path})
    kinds = (tmp_path / "asked").read_text().split()
    return done.returncode, [k for k in kinds if k in ("create", "delete", "wait")], done.stderr


def test_it_waits_in_the_queue_and_starts_again_after_a_save(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE"]
    script = {"describe": states, "wait": [EXIT_PREEMPTED, 0]}
    assert loop(tmp_path, script)[:2] == (0, ["create", "wait", "wait"])


def test_a_slice_that_was_taken_away_is_asked_for_anew(tmp_path):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", "PROVISIONING", "ACTIVE"]
    script = {"describe": states, "wait": [255, 0]}
    assert loop(tmp_path, script)[:2] == (0, ["wait", "delete", "create", "wait"])


def test_a_neighbours_failure_is_told_from_a_mistake_by_the_slice(tmp_path):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    script = {"describe": states, "wait": [1, 0]}
    assert loop(tmp_path, script)[:2] == (0, ["wait", "delete", "create", "wait"])


def test_a_broken_connection_is_attached_again(tmp_path):
    script = {"describe": ["ACTIVE"], "wait": [255, 0]}
    assert loop(tmp_path, script)[:2] == (0, ["wait", "wait"])


def test_a_run_that_fails_is_not_repeated(tmp_path):
    code, kinds, stderr = loop(tmp_path, {"describe": ["ACTIVE"], "wait": [1]})
    assert (code, kinds) == (2, ["wait"])
    assert "training left with code 1" in stderr


def test_preemptions_have_a_bound(tmp_path):
    code, kinds, stderr = loop(tmp_path, {"describe": ["ACTIVE"], "wait": [EXIT_PREEMPTED]})
    assert (code, kinds) == (2, ["wait"] * 3)
    assert "started 3 times" in stderr
