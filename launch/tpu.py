#!/usr/bin/env python3
r"""Runs `lcl train` on a Cloud TPU slice, or on several: get it, set it up, train, come back.

    launch/tpu.py run long --zone=us-east5-a --spot -- \
        --gin_file=configs/pods/llama3_8b_1m_v5p_32.gin --run_dir=gs://bucket/long

`run` is the loop a person would otherwise sit beside. What it does on each exit of the training:

    0             done
    75            told to leave, state saved (lcl.preemption): once the slice is there, start again
    ssh broke     look at the slice: there -> attach again; gone -> delete what is left, ask anew
    anything else stop, and leave the slice for a look

The other commands are its steps. Every command takes --dry_run, which prints what would be run
(a shell can run the lines) and runs nothing. Needs gcloud, signed in; nothing of lcl or JAX, so any
laptop will do. The training itself does not hang on this process: it may be stopped and started.

Slices are asked for as queued resources. One slice is one TPU VM node, NAME; --slices=2 makes the
nodes NAME-0 and NAME-1 of one request, and the runtime joins them (MEGASCALE).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

PREEMPTED = 75  # lcl.preemption.EXIT_PREEMPTED; a test holds the two together
SSH_BROKE = 255
FOLDER = "lcl"  # of the checkout, in the home folder of every worker
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What people call a generation -> (accelerator type's prefix, runtime version).
GENERATIONS = {
    "v4": ("v4", "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
}
_TYPE = re.compile(r"(?:(\d+) ?x ?)?(v4|v5e|v5litepod|v5p|v6e)-(\d+)")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?")
_TOPOLOGY = re.compile(r"^compile\.topology\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


class Mistake(ValueError):
    """A mistake of the user's: one line that names the value and the mend."""


class Slice:
    """What is asked for, and the gcloud commands that concern it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.name = options.name
        if not _NAME.fullmatch(self.name):
            raise Mistake(
                f"name {self.name!r}: use at most 39 lower-case letters, digits and -, first a "
                "letter"
            )
        given = options.type or _topology_of(options.words)
        match = _TYPE.fullmatch(given)
        if not match:
            raise Mistake(
                f"--type {given!r}: use a name such as v5e-256, v6e-64 or v5p-128 (v5p counts "
                "cores), or '2x v5e-256' for two slices"
            )
        generation = "v5e" if match[2] == "v5litepod" else match[2]
        self.generation = generation
        prefix, self.runtime = GENERATIONS[generation]
        self.accelerator = f"{prefix}-{match[3]}"
        self.slices = options.slices or int(match[1] or 1)
        if options.slices and match[1] and int(match[1]) != options.slices:
            raise Mistake(
                f"--type {given!r} is {match[1]} slices and --slices={options.slices}: give one"
            )
        if self.slices < 1:
            raise Mistake(f"--slices={self.slices}: at least 1")
        self.runtime = options.runtime_version or self.runtime

    def _gcloud(self, *words: str) -> list[str]:
        command = ["gcloud", *words, f"--zone={self.options.zone}"]
        if self.options.project:
            command.append(f"--project={self.options.project}")
        return command

    def create(self) -> list[str]:
        """The request; it waits in the queue until the slices can be had."""
        words = ["compute", "tpus", "queued-resources", "create", self.name]
        if self.slices == 1:
            words.append(f"--node-id={self.name}")
        else:
            words += [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        words += [f"--accelerator-type={self.accelerator}", f"--runtime-version={self.runtime}"]
        if self.options.spot:
            words.append("--spot")
        if self.options.reserved:
            words.append("--reserved")
        return self._gcloud(*words)

    def state(self) -> list[str]:
        """Prints the request's state, such as ACTIVE or SUSPENDED."""
        queued = ("compute", "tpus", "queued-resources", "describe", self.name)
        return [*self._gcloud(*queued), "--format=value(state.state)"]

    def delete(self) -> list[str]:
        """Gives everything back, nodes included."""
        queued = ("compute", "tpus", "queued-resources", "delete", self.name)
        return [*self._gcloud(*queued), "--force", "--quiet"]

    def ssh(self, command: str) -> list[str]:
        """Runs a shell line on every worker of every slice; exits with the first bad code."""
        kind, every = ("tpu-vm", []) if self.slices == 1 else ("queued-resources", ["--node=all"])
        words = ("compute", "tpus", kind, "ssh", self.name, "--worker=all", *every)
        return [*self._gcloud(*words), f"--command={command}"]

    def copy(self, path: str) -> list[str]:
        """Copies a file to the home folder of every worker."""
        kind, every = ("tpu-vm", []) if self.slices == 1 else ("queued-resources", ["--node=all"])
        words = ("compute", "tpus", kind, "scp", path, f"{self.name}:", "--worker=all", *every)
        return self._gcloud(*words)


def _topology_of(words: Sequence[str]) -> str:
    """The slice that a pod's configuration is meant for: its `compile.topology`."""
    for name in _option(words, "--gin_file"):
        path = name if os.path.exists(name) else os.path.join(ROOT, name)
        if not os.path.exists(path):
            raise Mistake(f"--gin_file={name}: there is no such file, here or in {ROOT}")
        with open(path) as file:
            match = _TOPOLOGY.search(file.read())
        if match:
            return match[1]
    raise Mistake(
        "which slice? Give --type=v5p-128, or a --gin_file after -- that sets compile.topology "
        "(configs/pods)"
    )


def _option(words: Sequence[str], name: str) -> list[str]:
    """Values of `--name=VALUE` and `--name VALUE` among the words of a command."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return values + [b for a, b in zip(words, words[1:], strict=False) if a == name]


def check_training(words: Sequence[str]) -> None:
    """Refuses what would only fail, or be lost, on the pod."""
    if not _option(words, "--gin_file"):
        raise Mistake("no configuration: give --gin_file=configs/pods/... after --")
    run_dirs = _option(words, "--run_dir")
    if not run_dirs:
        raise Mistake("no --run_dir after --: give a folder that all workers share")
    if not os.path.isabs(run_dirs[-1]) and "://" not in run_dirs[-1]:
        raise Mistake(
            f"--run_dir={run_dirs[-1]} would be another folder on every worker: give a bucket "
            "(gs://...) or an absolute path on storage that all of them mount (Filestore)"
        )


class Runner:
    """Runs commands, or prints them."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def show(self, command: Sequence[str]) -> None:
        """Prints a command as a line that a shell would run."""
        print(shlex.join(command), flush=True)

    def call(self, command: Sequence[str]) -> int:
        """The exit code of a command; its output is ours."""
        self.show(command)
        return 0 if self.dry_run else subprocess.run(command).returncode

    def check(self, command: Sequence[str]) -> None:
        """A command that has to succeed."""
        code = self.call(command)
        if code:
            raise Mistake(f"{command[0]} left with code {code}: see above; then run this again")

    def output(self, command: Sequence[str], dry: str) -> str:
        """A command's output without line ends, "" if it failed; `dry` in a dry run."""
        if self.dry_run:
            self.show(command)
            return dry
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def sleep(self, seconds: float) -> None:
        """Waits, unless nothing is being run."""
        if not self.dry_run:
            time.sleep(seconds)


def get(target: Slice, runner: Runner) -> None:
    """Sees to it that the slices are there: asks for them, or waits in the queue.

    A request whose slices were taken away (SUSPENDED) never gets them back: it is deleted and made
    again. So is a FAILED one.
    """
    state = runner.output(target.state(), dry="")
    while state != "ACTIVE":
        if state in ("SUSPENDED", "SUSPENDING", "FAILED"):
            print(f"# {target.name} is {state}: deleting it and asking again", flush=True)
            runner.check(target.delete())
            state = ""
        if not state:
            runner.check(target.create())
        runner.sleep(target.options.poll)
        state = runner.output(target.state(), dry="ACTIVE")


def setup(target: Slice, runner: Runner) -> None:
    """Brings the committed code to every worker and installs it; nothing to do the second time."""
    archive = os.path.join(ROOT, ".git", "lcl-launch.tar.gz")
    runner.check(["git", "-C", ROOT, "archive", "--format=tar.gz", f"--output={archive}", "HEAD"])
    runner.check(target.copy(archive))
    unpack = f"mkdir -p {FOLDER} && tar -xzf {os.path.basename(archive)} -C {FOLDER}"
    runner.check(target.ssh(f"{unpack} && {FOLDER}/launch/worker.sh setup"))
    if target.options.prepare:
        runner.check(target.ssh(f"cd {FOLDER} && {target.options.prepare}"))


def worker(target: Slice, *words: str) -> list[str]:
    """Runs launch/worker.sh with these words on every worker."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in _environment(target)]
    script = f"{FOLDER}/launch/worker.sh"
    return target.ssh(" ".join([*settings, script, shlex.join(words)]))


def _environment(target: Slice) -> list[tuple[str, str]]:
    pairs = []
    for setting in target.options.env:
        name, equals, value = setting.partition("=")
        if not equals or not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            raise Mistake(f"--env={setting}: should be NAME=VALUE, such as LIBTPU_INIT_ARGS=...")
        pairs.append((name, value))
    return pairs


def run(target: Slice, runner: Runner) -> int:
    """Gets, sets up, trains and comes back until the training is done; its exit code."""
    check_training(target.options.words)
    for attempt in range(target.options.max_restarts + 1):
        get(target, runner)
        setup(target, runner)
        runner.check(worker(target, "start", target.name, *target.options.words))
        code = runner.call(worker(target, "wait", target.name))
        while code == SSH_BROKE and runner.output(target.state(), dry="ACTIVE") == "ACTIVE":
            # Our connection broke, or one worker died. `stop` makes the others leave too, where
            # any is left; on those that still train it would cost the steps since the last save.
            print("# the connection or a worker is gone: trying to attach again", flush=True)
            runner.sleep(target.options.poll)
            code = runner.call(worker(target, "wait", target.name))
            if code == SSH_BROKE:
                runner.call(worker(target, "stop", target.name))
                break
        if code == 0:
            print(f"# {target.name}: done; `{sys.argv[0]} delete` gives the slice back", flush=True)
            return 0
        # A worker whose neighbour was taken away fails in its own way: the slice's state decides.
        gone = runner.output(target.state(), dry="ACTIVE") != "ACTIVE"
        if code not in (PREEMPTED, SSH_BROKE) and not gone:
            where = f"~/.lcl-launch/{target.name}/log on its workers"
            raise Mistake(f"training left with code {code}: see {where}; the slice is kept")
        print(f"# left with code {code}: start {attempt + 2}", flush=True)
        runner.sleep(target.options.poll)
    raise Mistake(f"started {target.options.max_restarts + 1} times: see --max_restarts")


def xpk(target: Slice, runner: Runner) -> int:
    """The same on GKE, as a JobSet that xpk makes; Kubernetes does the restarting.

    A pod that is evicted gets SIGTERM and --grace seconds to save in. JobSet restarts all pods on
    any failure, so --max_restarts bounds what a program that always fails may cost.
    """
    options = target.options
    check_training(options.words)
    if not options.cluster or not options.docker_image:
        raise Mistake(
            "xpk needs --cluster=NAME and --docker_image=IMAGE (lcl[tpu] installed in it)"
        )
    inside = " ".join(["launch/worker.sh", "run", shlex.join(options.words)])
    # GKE names the workers in the environment itself.
    settings = [*_environment(target), ("LCL_POD", "0")]
    command = ["xpk", "workload", "create", f"--cluster={options.cluster}"]
    command += [f"--workload={options.name}", f"--tpu-type={target.accelerator}"]
    command += [f"--num-slices={target.slices}", f"--docker-image={options.docker_image}"]
    command += [f"--zone={options.zone}"]
    command += [f"--project={options.project}"] if options.project else []
    command += ["--spot"] if options.spot else []
    command += [f"--max-restarts={options.max_restarts}", "--restart-on-user-code-failure"]
    command += [f"--termination-grace-period-seconds={options.grace}"]
    command += [f"--env={name}={value}" for name, value in settings]
    return runner.call([*command, f"--command={inside}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {
        "run": "get the slice, set it up, train, and start again after preemptions",
        "create": "ask for the slice and wait for it",
        "setup": "copy HEAD to every worker and install it",
        "start": "start training on every worker, detached",
        "wait": "follow it; exits with its code",
        "stop": "make it save and leave",
        "status": "print the request's state",
        "delete": "give the slice back",
        "xpk": "start it on a GKE cluster through xpk instead",
    }
    text = "; ".join(f"{name}: {what}" for name, what in commands.items())
    parser.add_argument("command", choices=list(commands), metavar="COMMAND", help=text)
    parser.add_argument("name", metavar="NAME", help="of the slice, and of the training on it")
    add = parser.add_argument
    add("--zone", required=True, help="such as us-east5-a")
    add("--project", default="", help="gcloud's own, if absent")
    add("--type", default="", help="v5p-128, 2x v5e-256, ...; default: the gin file's topology")
    add("--slices", type=int, default=0, help="how many, joined by the data-centre network")
    add("--spot", action="store_true", help="cheap, and taken away at any moment")
    add("--reserved", action="store_true", help="from the project's reservation")
    add("--runtime_version", default="", help="the TPU VM's image; default: by generation")
    add("--prepare", default="", help="a shell line for every worker after setup, such as a mount")
    add("--env", action="append", default=[], help="NAME=VALUE for the training; repeatable")
    add("--max_restarts", type=int, default=50, help="of the whole slice, by `run` and xpk")
    add("--poll", type=float, default=60.0, help="seconds between two looks at the queue")
    add("--cluster", default="", help="xpk: the GKE cluster")
    add("--docker_image", default="", help="xpk: an image with this checkout as working folder")
    add("--grace", type=int, default=300, help="xpk: seconds between SIGTERM and the end")
    add("--dry_run", action="store_true", help="print the commands, run nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one command; a mistake is one line and code 2."""
    # What follows -- is for `lcl train`; argparse would take some of it for its own.
    ours, words = list(argv), []
    if "--" in ours:
        at = ours.index("--")
        ours, words = ours[:at], ours[at + 1 :]
    options = _parser().parse_args(ours)
    options.words = words
    try:
        target, runner = Slice(options), Runner(options.dry_run)
        program = "xpk" if options.command == "xpk" else "gcloud"
        if not options.dry_run and not shutil.which(program):
            raise Mistake(f"{program} is not on PATH: install it, or see the commands by --dry_run")
        if options.command == "run":
            return run(target, runner)
        if options.command == "xpk":
            return xpk(target, runner)
        if options.command in ("create", "setup"):
            (get if options.command == "create" else setup)(target, runner)
            return 0
        if options.command == "start":
            check_training(words)
            return runner.call(worker(target, "start", target.name, *words))
        if options.command in ("wait", "stop"):
            return runner.call(worker(target, options.command, target.name))
        return runner.call(target.state() if options.command == "status" else target.delete())
    except Mistake as error:
        print(f"launch/tpu.py {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("# left; what was started on the slice goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
