"""What every test shares: one CPU device, a persistent compile cache, goldens, child processes."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"


def _cpu_name() -> str:
    """The CPU's identity: a compiled program may not run on a CPU with fewer features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    wanted = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    return hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]


# Set before any test imports JAX; child processes inherit it. A caller's own choice wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "lcl" / f"tests-{_cpu_name()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# For children with several devices, which compile afresh: a third less CPU time for a small model.
# XLA's own passes and its partitioning are as ever; LLVM optimises less.
QUICK_COMPILE = "--xla_backend_optimization_level=0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the files under tests/golden with what the code gives now; review the diff",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        import hypothesis
    except ImportError:  # the smoke environment of the newer interpreter may lack it
        return
    # The same examples each time, so that a red test is red for everyone. To look for new
    # counterexamples: HYPOTHESIS_PROFILE=explore.
    hypothesis.settings.register_profile(
        "lcl", deadline=None, derandomize=True, max_examples=50, database=None
    )
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lcl"))


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """`golden("configs/x.txt", text)` holds text to tests/golden/configs/x.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        text = text if text.endswith("\n") else text + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if not path.exists():
            pytest.fail(f"no golden file tests/golden/{name}: run this test with --update-golden")
        want = path.read_text()
        if text != want:
            diff = difflib.unified_diff(
                want.splitlines(), text.splitlines(), "golden", "now", lineterm=""
            )
            pytest.fail(
                f"tests/golden/{name} differs; if this is meant, run with --update-golden and "
                "review the diff:\n" + "\n".join(diff),
                pytrace=False,
            )

    return check


@pytest.fixture
def run_python(tmp_path: pathlib.Path):
    """Runs python code in a child process and returns its stdout; fails with its stderr.

    `run_python(code, devices=8)` gives the child eight CPU devices, which only works before its
    first import of JAX: hence a process, compiled quickly rather than well. `args` follow the code,
    `env` is added to ours.
    """

    from lcl.parallel import host_device_environment

    def run(
        code: str,
        *args: str,
        devices: int = 1,
        env: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> str:
        child = dict(os.environ)
        child["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), child.get("PYTHONPATH", "")])
        if devices > 1:
            child["XLA_FLAGS"] = f"{child.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()
        child.update(host_device_environment(devices, child))
        child.update(env or {})
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=child,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            pytest.fail(
                f"child exited {done.returncode}\n--- stdout\n{done.stdout[-4000:]}"
                f"\n--- stderr\n{done.stderr[-8000:]}",
                pytrace=False,
            )
        return done.stdout

    return run
