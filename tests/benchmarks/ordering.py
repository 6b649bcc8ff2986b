"""Orders of documents by likeness: what they cost and what they bring, on text and on clusters.

    text        every section of the prepared corpora (pages cut at paragraphs, some 700 characters
                each) is a document; its page is its topic. The corpora are prepared by this script,
                from the distribution's packages. Vectors: hashed TF-IDF. Neighbours: exact. The
                sections are shuffled first: an order that takes the lowest number when it has to
                choose would else be given the pages.
    clusters    Gaussian topics of some 60 documents in 64 dimensions, noise 0.9, at several sizes.
                Neighbours: exact up to --exact documents, where that is feasible, and by faiss.

All orders use the same neighbour lists. Printed for each: the mean cosine of documents that follow
one another, the purity of windows of 32 documents (the share of the commonest topic), the share of
hops that are no edge, CPU seconds and peak memory of a process of its own, inputs included.

    released    the released heuristic, rewritten (`lcl.data.order_baselines.released`)
    static, residual    the paper's walk (`lcl.data.ordering.traverse`)
    chained     short chains along a tree (`lcl.data.chain_order.chained`)
    as script   released with the sets, dictionaries and array rows of the script: what it costs

    python tests/benchmarks/ordering.py [--sizes 10000 100000 1000000] [--only text]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

CORPORA = (
    "python pydoc manpages-en manpages-fr manpages-de manpages-ja manpages-es "
    "libreoffice-help-en libreoffice-help-fr libreoffice-help-de libreoffice-help-ja long-prose "
    "handbook-en handbook-fr handbook-de handbook-es handbook-ja handbook-ru handbook-zh metamath"
).split()
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "lcl"
NUM_NEIGHBORS = 10
ORDERS = ("random", "knn", "released", "as script", "static", "residual", "chained")


# What is measured runs in a child, so that its memory is its own. A child reads .npy files from a
# folder, writes .npy files there and prints one JSON line.


def child(task: str, folder: pathlib.Path, **options: object) -> dict:
    command = [sys.executable, __file__, "--child", task, str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_child(task: str, folder: pathlib.Path, options: dict) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    TASKS[task](folder, **options)
    figures = {
        "wall": time.perf_counter() - wall - _LOADED["wall"],
        "cpu": time.process_time() - cpu - _LOADED["cpu"],
        "peak_mb": peak_megabytes(),
    }
    print(json.dumps(figures))


def peak_megabytes() -> int:
    """Of this process only: what getrusage says of a child begins with its parent's peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


_LOADED = {"wall": 0.0, "cpu": 0.0}  # time for reading inputs and writing results


def load(path: pathlib.Path) -> np.ndarray:
    begin = time.perf_counter(), time.process_time()
    array = np.load(path)
    _LOADED["wall"] += time.perf_counter() - begin[0]
    _LOADED["cpu"] += time.process_time() - begin[1]
    return array


def embed_text(folder: pathlib.Path, store: str, dim: int) -> None:
    from lcl.data import HashedTfidf, Store
    from lcl.data.embeddings import quantise

    opened = Store.open(store)
    blocks = [quantise(block) for block in HashedTfidf(dim=dim).embed(opened)]
    np.save(folder / "vectors.npy", np.concatenate(blocks))


def find_neighbors(folder: pathlib.Path, index: str) -> None:
    from lcl.data.neighbors import nearest

    ids, similarity = nearest(load(folder / "vectors.npy"), NUM_NEIGHBORS, index=index)
    np.save(folder / f"ids-{index}.npy", ids)
    np.save(folder / f"similarity-{index}.npy", similarity)


def make_order(folder: pathlib.Path, index: str, order: str) -> None:
    from lcl.data import ordering
    from lcl.data.chain_order import chained
    from lcl.data.order_baselines import released, with_neighbors

    ids = load(folder / f"ids-{index}.npy")
    if order == "random":
        result = ordering.shuffle(len(ids), seed=0, domain="benchmark")
    elif order == "knn":
        result = with_neighbors(ordering.shuffle(len(ids), seed=0, domain="benchmark"), ids)
    elif order == "released":
        result = released(ids)
    elif order == "as script":
        result = np.array(as_script(ids))
    elif order == "chained":
        result = chained(ids, load(folder / f"similarity-{index}.npy"))
    else:
        similarity = load(folder / f"similarity-{index}.npy")
        result = ordering.traverse(ids, similarity, degree=order)  # type: ignore[arg-type]
    begin = time.perf_counter(), time.process_time()
    np.save(folder / f"order-{index}-{order}.npy", result)
    _LOADED["wall"] += time.perf_counter() - begin[0]
    _LOADED["cpu"] += time.process_time() - begin[1]


def as_script(knns: np.ndarray, cluster_size: int = 21) -> list[int]:
    """The released heuristic in its script's data structures, with the guards of `released`."""
    unseen, seen = set(range(len(knns))), set()
    clusters, cluster_of = defaultdict(list), {}
    cluster = size = 0
    document = unseen.pop()
    clusters[0].append(document)
    cluster_of[document] = 0
    seen.add(document)
    while unseen:
        first = None
        for k in knns[document, :][:9]:
            if k not in seen:
                first = k
                break
        if first is None or size >= cluster_size:
            document = unseen.pop()
            cluster, size = cluster + 1, 0
        else:
            document = first
            unseen.remove(document)
        clusters[cluster].append(document)
        cluster_of[document] = cluster
        size += 1
        seen.add(document)
    for number, documents in clusters.copy().items():
        if len(documents) < cluster_size:
            for document in list(documents):
                near = None
                for k in knns[document, :][:9]:
                    if cluster_of[k] != number:
                        near = k
                        break
                if near is None:
                    continue
                others = clusters[cluster_of[near]]
                others.insert(others.index(near), document)
                cluster_of[document] = cluster_of[near]
                documents.remove(document)
            if not documents:
                del clusters[number]
    return [document for documents in clusters.values() for document in documents]


TASKS = {"embed": embed_text, "neighbors": find_neighbors, "order": make_order}


# What is looked at in the parent.


def purity(topics: np.ndarray, order: np.ndarray, window: int = 32) -> float:
    """Mean share of the commonest topic in consecutive windows; a short last one is left out."""
    rows = np.sort(topics[order[: len(order) // window * window]].reshape(-1, window), axis=1)
    best = np.ones(len(rows), int)
    run = np.ones(len(rows), int)
    for j in range(1, window):
        run = np.where(rows[:, j] == rows[:, j - 1], run + 1, 1)
        best = np.maximum(best, run)
    return float(best.mean() / window)


def compare(title: str, folder: pathlib.Path, index: str, topics: dict[str, np.ndarray]) -> dict:
    from lcl.data.neighbors import adjacent_similarity
    from lcl.data.ordering import jumps

    vectors, ids = np.load(folder / "vectors.npy"), np.load(folder / f"ids-{index}.npy")
    rows = {}
    for order in ORDERS:
        figures = child("order", folder, index=index, order=order)
        places = np.load(folder / f"order-{index}-{order}.npy")
        figures["mean_similarity"] = float(adjacent_similarity(vectors, places).mean())
        figures["jumps"] = int(jumps(places, ids).sum()) - 1
        figures["places"] = len(places)
        for name, labels in topics.items():
            figures[f"{name}_purity"] = purity(labels, places)
        rows[order] = figures
    assert np.array_equal(
        np.load(folder / f"order-{index}-released.npy"),
        np.load(folder / f"order-{index}-as script.npy"),
    ), "the rewritten heuristic is not the script's"
    print(f"\n{title}, neighbours: {index}")
    heads = [f"{name} purity" for name in topics]
    print(f"{'order':10s} {'cosine':>7s} {'  '.join(heads)} {'jumps':>7s} {'cpu s':>8s} {'MB':>6s}")
    for order, f in rows.items():
        purities = "  ".join(
            f"{f[f'{name}_purity']:{len(head)}.3f}"
            for name, head in zip(topics, heads, strict=True)
        )
        print(
            f"{order:10s} {f['mean_similarity']:7.3f} {purities} {f['jumps'] / f['places']:7.1%} "
            f"{f['cpu']:8.2f} {f['peak_mb']:6d}"
        )
    ratios: dict = {}
    for ours in ("residual", "chained"):
        for other in ("released", "as script", "static"):
            theirs = rows[other]
            ratio = {
                "cosine": rows[ours]["mean_similarity"] / theirs["mean_similarity"],
                "cpu": theirs["cpu"] / rows[ours]["cpu"],
                **{
                    f"{name}_purity": rows[ours][f"{name}_purity"] / theirs[f"{name}_purity"]
                    for name in topics
                },
            }
            ratios[f"{ours} / {other}"] = ratio
            said = ", ".join(f"{k.replace('_', ' ')} {v:.3f}x" for k, v in ratio.items())
            print(f"{ours} / {other}: {said} (cpu: how many times faster)")
    return {"index": index, "orders": rows, "ratios": ratios}


def sections(root: pathlib.Path, target: int = 700) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A store whose documents are sections of pages, and which page and corpus each is from."""
    from lcl.data import Data, StoreWriter
    from lcl.data.prepare import prepare
    from lcl.data.tokenizers import ByteTokenizer

    data_root, path = root / "stores", root / f"sections-{target}" / "train"
    prepare(CORPORA, root=str(data_root), log=lambda line: print(line, file=sys.stderr))
    labels_path = root / f"sections-{target}.npy"
    data = Data(str(data_root))
    if not (path.exists() and labels_path.exists()):
        labels, page = [], 0
        with StoreWriter(
            path, tokenizer=ByteTokenizer(), domain="sections", split="train"
        ) as writer:
            for number, name in enumerate(CORPORA):
                store = data.open(name)
                tokenizer = store.tokenizer()
                for i in range(store.num_documents):
                    for text in cut(tokenizer.decode(store.document(i)[1:-1]), target):
                        writer.add(text, document_id=len(labels))
                        labels.append((page, number))
                    page += 1
        np.save(labels_path, np.array(labels))
    labels = np.load(labels_path)
    return path, {"page": labels[:, 0], "corpus": labels[:, 1]}


def cut(text: str, target: int) -> list[str]:
    """Paragraphs, joined until they have `target` characters; what is short at the end is left."""
    parts, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= target:
            parts.append(current[: 8 * target])
            current = ""
    return [*parts, current] if len(current) >= target // 4 else parts


def on_text(root: pathlib.Path, dim: int) -> dict:
    from lcl.data import Store
    from lcl.data.in_context import among_kept, without
    from lcl.data.neighbors import Neighbors, near_duplicates
    from lcl.data.ordering import shuffle, traverse

    path, topics = sections(root)
    store = Store.open(path)
    print(
        f"text: {store.num_documents} sections of {len(np.unique(topics['page']))} pages of "
        f"{len(CORPORA)} corpora, {store.num_bytes / 1e6:.1f} MB"
    )
    result: dict = {"documents": store.num_documents, "bytes": store.num_bytes}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        result["embed"] = child("embed", folder, store=str(path), dim=dim)
        mixed = shuffle(store.num_documents, seed=1, domain="sections")
        topics = {name: labels[mixed] for name, labels in topics.items()}
        np.save(folder / "vectors.npy", np.load(folder / "vectors.npy")[mixed])
        result["neighbors"] = child("neighbors", folder, index="exact")
        for step in ("embed", "neighbors"):
            say(step, result[step])
        ids, similarity = (
            np.load(folder / "ids-exact.npy"),
            np.load(folder / "similarity-exact.npy"),
        )
        own = topics["page"][ids] == topics["page"][:, None]
        print(f"neighbours of the same page: {own.mean():.3f}; nearest: {own[:, 0].mean():.3f}")
        for threshold in (0.99, 0.95, 0.9, 0.8):
            count = int((near_duplicates(Neighbors(ids, similarity), threshold) >= 0).sum())
            print(f"near-duplicates at {threshold}: {count} ({count / len(ids):.1%})")
            result[f"duplicates_{threshold}"] = count
        result["compared"] = compare("text", folder, "exact", topics)
        duplicate = near_duplicates(Neighbors(ids, similarity), 0.95) >= 0
        lists = among_kept(
            without(Neighbors(ids, similarity), duplicate, NUM_NEIGHBORS),
            np.flatnonzero(~duplicate),
        )
        kept = np.flatnonzero(~duplicate)[traverse(*lists)]
        result["pruned_page_purity"] = purity(topics["page"], kept)
        print(
            f"residual, near-duplicates at 0.95 out: page purity {result['pruned_page_purity']:.3f}"
        )
    return result


def on_clusters(num_documents: int, indexes: list[str], dim: int = 64) -> dict:
    from lcl.data.embeddings import quantise

    rng = np.random.default_rng(num_documents)
    topics = rng.integers(0, num_documents // 60, num_documents)
    centres = rng.normal(size=(num_documents // 60, dim)).astype(np.float32)
    result: dict = {"documents": num_documents, "dim": dim, "compared": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        vectors = np.empty((num_documents, dim), np.int8)
        for first in range(0, num_documents, 65536):
            part = topics[first : first + 65536]
            noise = rng.normal(size=(len(part), dim))
            vectors[first : first + 65536] = quantise(centres[part] + 0.9 * noise)
        np.save(folder / "vectors.npy", vectors)
        for index in indexes:
            neighbors = child("neighbors", folder, index=index)
            say(f"{num_documents} documents, {index} neighbours", neighbors)
            compared = compare(f"{num_documents} documents", folder, index, {"topic": topics})
            result["compared"].append({"neighbors": neighbors, **compared})
        if len(indexes) == 2:
            exact, other = (np.load(folder / f"ids-{index}.npy") for index in indexes)
            both = (np.sort(exact, 1)[:, :, None] == np.sort(other, 1)[:, None]).any(2).mean()
            result["recall"] = float(both)
            print(f"recall of {indexes[1]}: {both:.4f}")
    return result


def say(what: str, figures: dict) -> None:
    print(
        f"{what}: {figures['wall']:.1f} s, {figures['cpu']:.1f} CPU s, peak {figures['peak_mb']} MB"
    )


def main() -> None:
    """Measures, prints tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--exact", type=int, default=100_000, help="largest exact search")
    parser.add_argument("--only", choices=("text", "clusters"))
    parser.add_argument("--dim", type=int, default=1024, help="of the text's vectors")
    parser.add_argument("--root", type=pathlib.Path, default=CACHE / "benchmarks" / "ordering")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, folder, options = arguments.child
        run_child(task, pathlib.Path(folder), json.loads(options))
        return
    result: dict = {"cores": os.cpu_count(), "neighbors": NUM_NEIGHBORS}
    if arguments.only != "clusters":
        result["text"] = on_text(arguments.root, arguments.dim)
    if arguments.only != "text":
        result["clusters"] = []
        for size in arguments.sizes:
            indexes = ["exact", "faiss"] if size <= arguments.exact else ["faiss"]
            result["clusters"].append(on_clusters(size, indexes))
        print("\ngrowth of the orders, CPU seconds a million documents:")
        for clusters in result["clusters"]:
            rates = [
                f"{order} {clusters['compared'][-1]['orders'][order]['cpu'] * 1e6 / size:.2f}"
                for order in ("released", "residual", "chained")
                for size in [clusters["documents"]]
            ]
            print(f"{clusters['documents']:9d} documents: {', '.join(rates)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
