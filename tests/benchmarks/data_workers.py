"""The sides of tests/benchmarks/data.py, each in a process of its own; see there.

    python data_workers.py SIDE '{"its": "settings"}'

A worker sets itself up, says {"ready": true, "versions": {...}}, then answers each line on stdin (a
JSON object, its argument for a turn) with {"wall": s, "cpu": s, "out": ...}. CPU seconds include
those of child processes. Everything is imported inside the sides: half of them run under another
interpreter, with other packages.
"""

from __future__ import annotations

import glob
import importlib.metadata
import itertools
import json
import os
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Turn = Callable[[dict[str, Any]], Any]
NUM_SHARDS = 16  # of the ArrayRecord copy; mosaicml-streaming makes as many of 1 GB

# ---- (a) packing --------------------------------------------------------------------------------


def lognormal_lengths(count: int, low: int, high: int, seed: int) -> np.ndarray:
    """Document lengths of the specification: lognormal(5.8, 1.1), clipped."""
    lengths = np.random.default_rng(seed).lognormal(5.8, 1.1, count)
    return np.clip(lengths, low, high).astype(np.int64)


def pack_ours(settings: dict[str, Any]) -> Turn:
    """Plans all rows; with "gather", also makes every batch of them from a flat token array."""
    from lcl.data.batch import gather_rows, layout_group
    from lcl.data.packing import pack

    lengths, length = np.array(settings["lengths"]), settings["row_length"]
    store = _FlatStore(lengths + 1)

    def turn(argument: dict[str, Any]) -> Any:
        layout = pack(lengths, length, method=settings["method"])
        tokens = layout.num_tokens
        if settings["gather"]:
            tokens = 0
            for first in range(0, layout.num_rows, 8):
                rows = np.arange(first, min(first + 8, layout.num_rows))
                group = layout_group(store, layout, rows, np.arange(len(rows)), 0)
                batch = gather_rows([group], len(rows), length, document_mask=True)
                tokens += int(np.count_nonzero(batch.segment_ids))
        return {"rows": layout.num_rows, "tokens": tokens}

    return turn


class _FlatStore:
    """What `layout_group` needs of a store: tokens and where documents begin."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = np.ones(int(self.offsets[-1]), np.uint16)
        self.lengths = lengths


def pack_grain(settings: dict[str, Any]) -> Turn:
    """Grain's packing transforms over the same documents, read as it is fastest (no threads)."""
    import grain
    from grain import experimental

    lengths, length = settings["lengths"], settings["row_length"]
    documents = [{"tokens": np.ones(n, np.int32)} for n in lengths]

    def turn(argument: dict[str, Any]) -> Any:
        read = grain.ReadOptions(num_threads=0)
        parent = grain.MapDataset.source(documents).to_iter_dataset(read)
        kwargs: dict[str, Any] = {"length_struct": {"tokens": length}}
        if settings["method"] == "concat":
            packed = experimental.ConcatThenSplitIterDataset(parent, **kwargs)
        else:
            kind = {"first_fit": "FirstFit", "best_fit": "BestFit"}[settings["method"]]
            make = getattr(experimental, f"{kind}PackIterDataset")
            packed = make(parent, num_packing_bins=settings["bins"], **kwargs)
        rows = tokens = 0
        for row in packed:
            rows += 1
            tokens += int(np.count_nonzero(row["tokens_segment_ids"]))
        return {"rows": rows, "tokens": tokens}

    return turn


# ---- (b) decomposition --------------------------------------------------------------------------


def decompose_ours(settings: dict[str, Any]) -> Turn:
    from lcl.data.decomposition import decompose

    lengths = np.array(settings["lengths"])

    def turn(argument: dict[str, Any]) -> Any:
        made = decompose(lengths, min_log2=8, max_log2=13, seed=0, tails="drop")
        return {"rows": made.num_rows, "tokens": int(made.tokens.sum())}

    return turn


def decompose_released(settings: dict[str, Any]) -> Turn:
    """The released script's loop (get_binary) on lengths: without token lists and tar files."""
    lengths = settings["lengths"]
    odds = 2.0 ** np.arange(6)
    odds /= odds.sum()

    def turn(argument: dict[str, Any]) -> Any:
        rng, choices = np.random.RandomState(0), np.arange(13, 7, -1)
        rows = tokens = 0
        for rest in lengths:
            while rest > 0:
                k = rest.bit_length() - 1
                if k < 8:
                    break
                if k > 13:
                    k = int(rng.choice(choices, p=odds))
                rows, tokens, rest = rows + 1, tokens + 2**k, rest - 2**k
        return {"rows": rows, "tokens": tokens}

    return turn


# ---- (c) random-access batches ------------------------------------------------------------------


def write_store(settings: dict[str, Any]) -> Turn:
    """The corpus of (c) as our store, and the rows of every batch, for all sides to read."""
    from lcl.data import Data, Mixture, StageData, build_stream
    from lcl.data.store import FORMAT_VERSION
    from lcl.data.tokenizers import ByteTokenizer

    def turn(argument: dict[str, Any]) -> Any:
        path = os.path.join(settings["root"], "bench", "train")
        os.makedirs(path, exist_ok=True)
        lengths = lognormal_lengths(settings["documents"], 17, 4097, 1)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.lib.format.open_memmap(
            f"{path}/tokens.npy", "w+", np.uint16, (int(offsets[-1]),)
        )
        rng = np.random.default_rng(2)
        for first in range(0, len(tokens), 1 << 24):
            part = tokens[first : first + (1 << 24)]
            part[:] = rng.integers(0, 1 << 16, len(part), np.uint16)
        tokens.flush()
        tokenizer = ByteTokenizer()
        arrays = {
            "offsets": offsets,
            "document_ids": np.arange(len(lengths)),
            "document_bytes": lengths - 2,
            "sources": np.zeros(len(lengths), np.int32),
            "token_num_bytes": tokenizer.token_num_bytes,
        }
        for name, array in arrays.items():
            np.save(f"{path}/{name}.npy", array)
        meta = {
            "format": FORMAT_VERSION, "domain": "bench", "split": "train", "tokenizer_spec": "byte",
            "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": 1 << 16,
            "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "licence": "random numbers",
            "settings": {}, "inputs": "", "extras": [], "source_names": ["bench"], "ledger": {},
            "num_documents": len(lengths), "num_tokens": int(offsets[-1]),
            "num_bytes": int(offsets[-1]), "content_fingerprint": "", "fingerprint": "bench",
        }  # fmt: skip
        with open(f"{path}/meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file)
        stage = StageData(Mixture({"bench": 1.0}), settings["length"], settings["rows"])
        stream = build_stream(
            Data(settings["root"]), [("bench", stage, settings["batches"])], seed=0
        )
        slices = [
            (t, row, *one)
            for t in range(settings["batches"])
            for row, origin in enumerate(stream.rows(t))
            for one in origin.slices
        ]
        np.save(settings["plan"], np.array(slices, np.int64))  # batch, row, document, start, length
        return {"tokens": int(offsets[-1]), "documents": len(lengths)}

    return turn


def batches_ours(settings: dict[str, Any]) -> Turn:
    """Whole batches, from the step's number (mixture and schedule are in the time) or from rows."""
    from lcl.data import Data, Mixture, StageData, build_stream

    stage = StageData(Mixture({"bench": 1.0}), settings["length"], settings["rows"])
    data = Data(settings["root"])
    stream = build_stream(data, [("bench", stage, settings["batches"])], seed=0)
    _read_through(settings["root"])

    batch_fn: Callable[[int], Any] = stream.batch
    if settings["how"] == "given the rows":
        from lcl.data.batch import gather_rows, layout_group

        count, length = settings["rows"], settings["length"]
        (plan,), places = stream._plans, np.arange(count)
        rows = [stream._locate(t, places).row for t in range(settings["batches"])]

        def batch_fn(t: int) -> Any:
            group = layout_group(plan.store, plan.layout, rows[t], places, 0)
            return gather_rows([group], count, length)

    return lambda argument: _checksum(map(batch_fn, argument["steps"]), argument["check"])


def batches_documents(settings: dict[str, Any]) -> Turn:
    """The same batches put together from documents that a library reads, from a ready-made plan."""
    slices = np.load(settings["plan"])
    cuts = np.searchsorted(slices[:, 0], np.arange(settings["batches"] + 1))
    shape = settings["rows"], settings["length"]
    read = {
        "arrayrecord": _read_arrayrecord,
        "streaming": _read_streaming,
        "datasets": _read_datasets,
    }[settings["library"]](settings)
    _read_through(settings["out"])

    def batch(t: int) -> tuple[np.ndarray, ...]:
        _, rows, documents, starts, lengths = slices[cuts[t] : cuts[t + 1]].T
        tokens, targets, segments, positions, sources = (np.zeros(shape, np.int32) for _ in "12345")
        weights = np.zeros(shape, np.float32)
        texts = read(documents.tolist())
        row_before = -1
        rest = zip(rows.tolist(), starts.tolist(), lengths.tolist(), texts, strict=True)
        for row, start, length, text in rest:
            if row != row_before:
                at, segment, row_before = 0, 0, row
            segment, end = segment + 1, at + length
            tokens[row, at:end] = text[start : start + length]
            targets[row, at:end] = text[start + 1 : start + 1 + length]
            segments[row, at:end] = segment
            positions[row, at:end] = counted[:length]
            weights[row, at:end] = 1.0
            at = end
        return tokens, targets, segments, positions, weights, sources

    counted = np.arange(settings["length"], dtype=np.int32)
    return lambda argument: _checksum(map(batch, argument["steps"]), argument["check"])


def _read_through(folder: str) -> None:
    """Brings all files of a folder into the page cache."""
    for path in glob.glob(f"{folder}/**", recursive=True):
        if os.path.isfile(path):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _checksum(batches: Any, check: bool) -> int:
    """Of all arrays of all batches; in timed turns (not `check`) only the sum of the inputs."""
    total = 0
    for batch in batches:
        if not check:
            total += int(batch[0].sum())
            continue
        for array in batch[:6]:
            total = zlib.crc32(np.ascontiguousarray(array), total)
    return total


def write_documents(settings: dict[str, Any]) -> Turn:
    """The corpus of (c) in a library's own format, a document a record."""

    def turn(argument: dict[str, Any]) -> Any:
        source = os.path.join(settings["root"], "bench", "train")
        offsets = np.load(f"{source}/offsets.npy")
        tokens = np.load(f"{source}/tokens.npy", mmap_mode="r")
        out = settings["out"]
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(out)
        documents = (tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True))
        if settings["library"] == "arrayrecord":
            from array_record.python.array_record_module import ArrayRecordWriter

            # 64 MB a file: reading one record costs in proportion to its file's number of records.
            each = -(-(len(offsets) - 1) // NUM_SHARDS)
            for shard in range(NUM_SHARDS):
                writer = ArrayRecordWriter(f"{out}/{shard:02d}.arrayrecord", "group_size:1")
                for document in itertools.islice(documents, each):
                    writer.write(document.tobytes())
                writer.close()
        elif settings["library"] == "streaming":
            from streaming import MDSWriter

            with MDSWriter(out=out, columns={"tokens": "bytes"}, size_limit=1 << 26) as writer:
                for document in documents:
                    writer.write({"tokens": document.tobytes()})
        else:
            import datasets
            import pyarrow as pa

            parts = []
            for first in range(0, len(offsets) - 1, 100_000):
                own = offsets[first : first + 100_001]
                values = pa.array(np.asarray(tokens[own[0] : own[-1]]))
                parts.append(pa.LargeListArray.from_arrays(own - own[0], values))
            table = pa.table({"tokens": pa.chunked_array(parts)})
            datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(out)
        return None

    return turn


def _read_arrayrecord(settings: dict[str, Any]) -> Callable[[list[int]], list[np.ndarray]]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source = ArrayRecordDataSource(sorted(glob.glob(f"{settings['out']}/*.arrayrecord")))
    if settings["how"] == "one by one":
        return lambda indices: [np.frombuffer(source[i], np.uint16) for i in indices]
    return lambda indices: [np.frombuffer(b, np.uint16) for b in source.__getitems__(indices)]


def _read_streaming(settings: dict[str, Any]) -> Callable[[list[int]], list[np.ndarray]]:
    from streaming import StreamingDataset

    source = StreamingDataset(local=settings["out"], shuffle=False, batch_size=1)
    return lambda indices: [np.frombuffer(source[i]["tokens"], np.uint16) for i in indices]


def _read_datasets(settings: dict[str, Any]) -> Callable[[list[int]], list[np.ndarray]]:
    import datasets

    source = datasets.load_from_disk(settings["out"])
    if settings["how"] == "numpy":
        source = source.with_format("numpy")
        return lambda indices: list(source[indices]["tokens"])
    source = source.with_format("arrow")

    def read(indices: list[int]) -> list[np.ndarray]:
        column = source[indices].column("tokens").combine_chunks()
        values, ends = column.values.to_numpy(), column.offsets.to_numpy()
        return [values[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]

    return read


# ---- (d) building a store -----------------------------------------------------------------------


def build_ours(settings: dict[str, Any]) -> Turn:
    """`lcl prepare`: also removes duplicates, splits, fingerprints every token."""
    import inspect

    from lcl.data.prepare import prepare

    kwargs: dict[str, Any] = {}
    if "processes" in inspect.signature(prepare).parameters:
        kwargs["processes"] = settings["cores"]

    def turn(argument: dict[str, Any]) -> Any:
        stores = prepare(
            root=argument["out"],
            jsonl={"corpus": settings["corpus"]},
            tokenizer=f"hf:{settings['tokenizer']}",
            log=lambda line: None,
            **kwargs,
        )
        return sum(store.num_tokens - 2 * store.num_documents for store in stores)

    return turn


def build_datasets(settings: dict[str, Any]) -> Turn:
    """load_dataset, map(tokenise), save_to_disk; a process a core."""
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    files = sorted(glob.glob(f"{settings['corpus']}/*.jsonl"))
    workers = settings["cores"] if settings["cores"] > 1 else None

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})

    def turn(argument: dict[str, Any]) -> Any:
        # Read anew for each job, as by the others: a tokenizer remembers the words it has seen.
        tokenizer = tokenizers.Tokenizer.from_file(settings["tokenizer"])
        tokenizer.encode_special_tokens = True

        def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
            found = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
            return {"tokens": [one.ids for one in found]}

        table = datasets.load_dataset(
            "json", data_files=files, split="train", cache_dir=f"{argument['out']}/cache"
        )
        made = table.map(
            encode, batched=True, remove_columns=table.column_names, num_proc=workers,
            features=features,
        )  # fmt: skip
        made.save_to_disk(f"{argument['out']}/tokens", num_proc=workers)
        return sum(len(chunk.flatten()) for chunk in made.data.column("tokens").chunks)

    return turn


def build_datatrove(settings: dict[str, Any]) -> Turn:
    """JsonlReader and DocumentTokenizer (unshuffled), a task a core."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()

    def turn(argument: dict[str, Any]) -> Any:
        out = argument["out"]
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(settings["corpus"], glob_pattern="*.jsonl"),
                DocumentTokenizer(
                    f"{out}/tokens", settings["tokenizer"], eos_token="<|eos|>",
                    shuffle_documents=False,
                ),
            ],
            tasks=settings["cores"], workers=settings["cores"], logging_dir=f"{out}/logs",
            start_method="fork",  # direct children, so that their CPU seconds are counted
        ).run()  # fmt: skip
        files = glob.glob(f"{out}/tokens/*.ds")
        assert files, f"datatrove has written nothing under {out}"
        return sum(os.path.getsize(path) for path in files) // 2 - settings["documents"]

    return turn


# ---- a worker -----------------------------------------------------------------------------------

SIDES = (
    pack_ours, pack_grain, decompose_ours, decompose_released, write_store, write_documents,
    batches_ours, batches_documents, build_ours, build_datasets, build_datatrove,
)  # fmt: skip
PACKAGES = ("numpy", "grain", "array-record", "datasets", "mosaicml-streaming", "datatrove")


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    if "lengths_of" in settings:
        settings["lengths"] = lognormal_lengths(*settings["lengths_of"]).tolist()
    turn = {side.__name__: side for side in SIDES}[name](settings)
    versions = {}
    for package in (*PACKAGES, "tokenizers", "pyarrow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(json.dumps({"ready": True, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        argument = json.loads(line)
        cpu, wall = cpu_seconds(), time.perf_counter()
        out = turn(argument)
        answer = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu, "out": out}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
