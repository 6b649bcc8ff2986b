"""Our data plane against Grain, ArrayRecord, mosaicml-streaming, datasets and datatrove.

    python tests/benchmarks/data.py packing planning            # needs nothing but lcl
    python -m venv peers                                       # for the other two parts
    peers/bin/pip install mosaicml-streaming array_record orjson
    peers/bin/pip install -U datasets datatrove transformers   # newer than streaming asks for
    python tests/benchmarks/data.py --peers-python peers/bin/python              # all four parts
    python tests/benchmarks/data.py batches --cores 1 --peers-python peers/bin/python

    packing    documents/s of planning rows (and of planning and making every batch) against Grain's
               FirstFit, BestFit and ConcatThenSplit over the same documents
    planning   tokens/s of planning a dataset decomposition, against the released script's loop
    batches    random batches of 8 x 4096 from a store of 1 GB, against libraries of documents
    building   tokenising a corpus into a store, against datasets' and datatrove's tokenise step

Each side is a process of its own; sides take turns, round by round, while the others sleep. Medians
over the rounds, and the ratio to ours within the same rounds; CPU seconds (children included) stand
beside wall seconds: on a machine that others use, trust the ratio of those. `--cores 1` pins every
side to one core.

Equal work is checked before anything is printed: the packers see the same documents and must place
every token; all six arrays of the batches must have equal checksums on all sides; the builders must
count the same tokens. Where ours does more (which rows a batch has; duplicates, split, fingerprint,
the ledger), it does it within its time. The page cache is warm: each side reads its files once
before.

Exit status 1 if the work was not equal, 2 if a peer is missing. Times are never asserted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PARTS = ("packing", "planning", "batches", "building")
PEERS = {
    "batches": ("array_record", "streaming", "datasets"),
    "building": ("datasets", "datatrove"),
}
ROW_LENGTH, BATCH_ROWS, BATCH_LENGTH = 2048, 8, 4096


class Side:
    """A worker process: one library at one job."""

    def __init__(self, label: str, name: str, settings: Mapping[str, Any], python: str, cores: int):
        self.label, self.walls, self.cpus, self.outs = label, [], [], []  # type: ignore[var-annotated]
        environment = dict(os.environ) | {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        command = [python, str(HERE / "data_workers.py"), name, json.dumps(settings)]
        if cores == 1:
            command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip
        self.versions = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.label} has died:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def turn(self, argument: Mapping[str, Any], keep: bool = True) -> Any:
        """Lets the side do its work once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(argument) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if keep:
            self.walls.append(answer["wall"])
            self.cpus.append(answer["cpu"])
            self.outs.append(answer["out"])
        return answer["out"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Bench:
    """The settings of a run, and what it has found so far."""

    def __init__(self, arguments: argparse.Namespace, work: pathlib.Path) -> None:
        self.arguments, self.work = arguments, work
        self.found: dict[str, Any] = {}
        self.versions: dict[str, str] = {}

    def side(self, label: str, name: str, settings: Mapping[str, Any], peer: bool = False) -> Side:
        python = self.arguments.peers_python if peer else sys.executable
        side = Side(label, name, settings, python, self.arguments.cores)
        self.versions |= {
            f"{p} ({'peers' if peer else 'ours'})": v for p, v in side.versions.items()
        }
        return side

    def once(self, name: str, settings: Mapping[str, Any], peer: bool = False) -> Any:
        """Runs a job that is not timed."""
        side = self.side(name, name, settings, peer)
        out = side.turn({})
        side.close()
        return out

    def table(self, part: str, title: str, sides: Sequence[Side], unit: str, amounts: Any) -> None:
        """Prints medians; `amounts[label]` units of work a turn, and extra columns."""
        print(f"\n{part}: {title}")
        head = ("", f"{unit}/s wall", "spread", f"{unit}/s CPU", "ours/it wall", "ours/it CPU", "")
        rows = []
        ours = sides[0]
        for side in sides:
            amount, extra = amounts[side.label]
            wall, cpu = statistics.median(side.walls), statistics.median(side.cpus)
            base = amounts[ours.label][0]
            by_wall, by_cpu = (
                statistics.median([b / a for a, b in zip(mine, its, strict=True)]) * base / amount
                for mine, its in ((ours.walls, side.walls), (ours.cpus, side.cpus))
            )
            spread = f"{amount / max(side.walls):,.4g}-{amount / min(side.walls):,.4g}"
            rows.append(
                (
                    side.label, f"{amount / wall:,.4g}", spread, f"{amount / cpu:,.4g}",
                    f"{by_wall:.2f}x", f"{by_cpu:.2f}x", extra,
                )
            )  # fmt: skip
            self.found.setdefault(part, {})[side.label] = {
                "unit": unit, "amount": amount, "wall": wall, "cpu": cpu, "note": extra,
                "ours_over_it_wall": round(by_wall, 3), "ours_over_it_cpu": round(by_cpu, 3),
            }  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [
                c.rjust(w) if 0 < i < 6 else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            print("  " + "  ".join(cells).rstrip())


def packing(bench: Bench) -> None:
    """(a)"""
    count = 2_000 if bench.arguments.quick else 20_000
    base = {"lengths_of": [count, 16, ROW_LENGTH, 0], "row_length": ROW_LENGTH}
    ours = [
        (f"ours {method}{' + batches' * gather}", {"method": method, "gather": gather})
        for method, gather in (
            ("best_fit", False), ("best_fit", True), ("first_fit", False), ("concat", False),
        )
    ]  # fmt: skip
    grain = [
        ("Grain BestFit, 64 bins", {"method": "best_fit", "bins": 64}),
        ("Grain BestFit, 256 bins", {"method": "best_fit", "bins": 256}),
        ("Grain FirstFit, 64 bins", {"method": "first_fit", "bins": 64}),
        ("Grain ConcatThenSplit", {"method": "concat"}),
    ]
    sides = [bench.side(label, "pack_ours", base | own) for label, own in ours]
    sides += [bench.side(label, "pack_grain", base | own) for label, own in grain]
    _rounds(bench, sides)
    amounts = {}
    tokens = {side.outs[0]["tokens"] for side in sides if "Concat" not in side.label}
    _equal("packers placed different numbers of tokens", tokens)
    for side in sides:
        out = side.outs[-1]
        fill = out["tokens"] / (out["rows"] * ROW_LENGTH)
        amounts[side.label] = count, f"fill {fill:.5f}, {out['rows']:,} rows"
    title = f"{count:,} documents, lognormal(5.8, 1.1) in 16..{ROW_LENGTH}, rows of {ROW_LENGTH}"
    bench.table("packing", title, sides, "documents", amounts)
    print(
        "  Grain moves tokens while it packs; ours only plans, but for '+ batches', which does both"
    )


def planning(bench: Bench) -> None:
    """(b)"""
    count = 10_000 if bench.arguments.quick else 200_000
    settings = {"lengths_of": [count, 16, 1 << 17, 0]}
    sides = [
        bench.side("ours decompose", "decompose_ours", settings),
        bench.side("released loop, lengths only", "decompose_released", settings),
    ]
    _rounds(bench, sides)
    amounts = {
        side.label: (side.outs[-1]["tokens"], f"{side.outs[-1]['rows']:,} rows") for side in sides
    }
    title = (
        f"{count:,} documents, lognormal(5.8, 1.1) in 16..131072, buckets 256..8192, tails dropped"
    )
    bench.table("planning", title, sides, "tokens", amounts)
    print("  documents over 16,384 tokens are cut by chance, by each in its own way")


def batches(bench: Bench) -> None:
    """(c)"""
    arguments, work = bench.arguments, bench.work / "batches"
    documents = 20_000 if arguments.quick else 1_000_000
    per_turn = 8 if arguments.quick else 64
    # Two turns of warming up, then a stretch of its own for each round.
    settings = {
        "root": str(work / "store"), "plan": str(work / "plan.npy"), "documents": documents,
        "rows": BATCH_ROWS, "length": BATCH_LENGTH, "batches": per_turn * (arguments.rounds + 1),
    }  # fmt: skip
    libraries = {
        "arrayrecord": ("__getitems__", "one by one"),
        "streaming": ("",),
        "datasets": ("arrow", "numpy"),
    }
    work.mkdir(parents=True, exist_ok=True)
    name = f"{documents}-{settings['batches']}"
    if not (work / f"written-{name}").exists():
        print(f"writing the corpus under {work}", file=sys.stderr)
        for mark in work.glob("written-*"):
            mark.unlink()
        bench.once("write_store", settings)
        (work / f"written-{name}").touch()
    for library in libraries:
        if not (work / f"written-{documents}-{library}").exists():
            print(f"writing its copy for {library}", file=sys.stderr)
            own = {"library": library, "out": str(work / library)}
            bench.once("write_documents", settings | own, peer=True)
            (work / f"written-{documents}-{library}").touch()
    size = (work / "store" / "bench" / "train" / "tokens.npy").stat().st_size
    sides = [
        bench.side(f"ours, {how}", "batches_ours", settings | {"how": how})
        for how in ("given the step", "given the rows")
    ]
    for library, ways in libraries.items():
        for how in ways:
            own = {"library": library, "out": str(work / library), "how": how}
            label = f"{library}, {how}" if how else library
            sides.append(bench.side(label, "batches_documents", settings | own, peer=True))
    for index in range(arguments.rounds + 1):  # the first warms up and compares all arrays
        steps = list(range(index * per_turn, (index + 1) * per_turn))
        argument = {"steps": steps, "check": index == 0}
        sums = {side.turn(argument, keep=index > 0) for side in _in_turn(sides, index)}
        _equal("the sides made different batches", sums)
    _close(sides)
    each = f"{BATCH_ROWS} x {BATCH_LENGTH}"
    amounts = {
        s.label: (per_turn, f"{1000 * statistics.median(s.walls) / per_turn:.3g} ms a batch")
        for s in sides
    }
    title = f"{each} from {size / 1e9:.2f} GB, {documents:,} documents, warm page cache"
    bench.table("batches", title, sides, "batches", amounts)
    print(
        "  all make the same six arrays (equal checksums); the others are given the slices of every"
    )
    print("  row, as 'ours, given the rows' is; 'ours, given the step' also finds out which rows")


def building(bench: Bench) -> None:
    """(d)"""
    arguments, work = bench.arguments, bench.work / "building"
    shutil.rmtree(work, ignore_errors=True)
    (work / "corpus").mkdir(parents=True)
    texts = _texts(1_000_000 if arguments.quick else 8_000_000)
    half = len(texts) // 2
    for i, part in enumerate((texts[:half], texts[half:])):
        lines = [json.dumps({"text": text, "id": f"{i}-{j}"}) for j, text in enumerate(part)]
        (work / "corpus" / f"{i}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _train_tokenizer(texts, work / "tokenizer.json")
    cores = arguments.cores or len(os.sched_getaffinity(0))
    settings = {
        "corpus": str(work / "corpus"), "tokenizer": str(work / "tokenizer.json"),
        "documents": len(texts), "cores": cores,
    }  # fmt: skip
    sides = [
        bench.side("ours prepare", "build_ours", settings),
        bench.side("datasets map", "build_datasets", settings, peer=True),
        bench.side("datatrove", "build_datatrove", settings, peer=True),
    ]
    for index in range(arguments.rounds + 1):
        counts = set()
        for side in _in_turn(sides, index):
            out = work / "out"
            counts.add(side.turn({"out": str(out)}, keep=index > 0))
            shutil.rmtree(out, ignore_errors=True)
        _equal("the sides counted different tokens", counts)
    _close(sides)
    (tokens,) = counts
    size = sum(len(text.encode()) for text in texts)
    amounts = {side.label: (tokens, "") for side in sides}
    title = f"{size / 1e6:.1f} MB of Python files, {len(texts):,} documents, BPE of 8,192 ids"
    bench.table("building", title, sides, "tokens", amounts)
    print("  ours also removes duplicates, splits, fingerprints and accounts for every document")


def _texts(limit: int) -> list[str]:
    """Distinct Python files of this interpreter, in the order of their names."""
    found: dict[bytes, str] = {}
    total = 0
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 200 < len(text) < 500_000 and "\0" not in text and total < limit:
            if found.setdefault(hashlib.sha256(text.encode()).digest(), text) is text:
                total += len(text)
    return list(found.values())


def _train_tokenizer(texts: Sequence[str], path: pathlib.Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:: max(1, len(texts) // 200)], trainer)
    tokenizer.save(str(path))
    borders = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    path.with_name("tokenizer_config.json").write_text(json.dumps(borders))


def _rounds(bench: Bench, sides: Sequence[Side]) -> None:
    for index in range(bench.arguments.rounds + 1):
        for side in _in_turn(sides, index):
            side.turn({}, keep=index > 0)  # the first round warms up
    _close(sides)


def _in_turn(sides: Sequence[Side], index: int) -> list[Side]:
    """Each round begins with another side."""
    first = index % len(sides)
    return [*sides[first:], *sides[:first]]


def _close(sides: Sequence[Side]) -> None:
    for side in sides:
        side.close()


def _equal(complaint: str, values: set[Any]) -> None:
    if len(values) != 1:
        print(f"{complaint}: {sorted(values)}", file=sys.stderr)
        raise SystemExit(1)


def _check_peers(python: str | None, parts: Sequence[str]) -> None:
    """Says what is missing and how to get it, instead of leaving a side out."""
    wanted = sorted({module for part in parts for module in PEERS.get(part, ())})
    if not wanted:
        return
    make = (
        "make them an environment (the three lines are in --help) and give "
        "--peers-python peers/bin/python, or run only the parts packing and planning"
    )
    if python is None:
        print(f"{', '.join(parts)} compares with {', '.join(wanted)}; {make}", file=sys.stderr)
        raise SystemExit(2)
    code = (
        "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])"
    )
    missing = subprocess.run([python, "-c", code, *wanted], capture_output=True, text=True)
    if missing.returncode or missing.stdout.strip():
        said = missing.stdout.strip() or missing.stderr.strip()[-500:]
        print(f"{python} lacks {said}; {make}", file=sys.stderr)
        raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if absent"
    )
    parser.add_argument("--peers-python", default=None, help="interpreter that has the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=0, help="1: pin every side to one core")
    parser.add_argument("--work", default=None, help="folder to keep the 1 GB corpora in (5 GB)")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    for part in parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; there are {', '.join(PARTS)}")
    _check_peers(arguments.peers_python, parts)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, pathlib.Path(arguments.work or temporary))
        for part in parts:
            globals()[part](bench)
            sys.stdout.flush()
    cores = arguments.cores or len(os.sched_getaffinity(0))
    print(f"\n{platform.processor() or platform.machine()}, {cores} cores, load {os.getloadavg()}")
    record = {"rounds": arguments.rounds, "cores": cores, "python": platform.python_version()}
    print(json.dumps(record | {"versions": bench.versions, "parts": bench.found}))


if __name__ == "__main__":
    main()
