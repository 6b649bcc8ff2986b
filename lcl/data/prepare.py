"""`lcl prepare`: from corpora and your own text to a root of tokenised stores.

    corpora, folders, jsonl  ->  documents  ->  unique, split  ->  <root>/<domain>/{train,heldout}

Calling it again costs nothing: a store whose inputs (packages, files, settings, tokenizer) have not
changed is left alone. A domain appears in the root when all of it is written, by a rename; a
process killed at any moment leaves what was there before.

A root is self-contained: the tokenizer's file, if it has one, is copied to <root>/tokenizer/.
`tokenizer="sentencepiece:16000"` trains a SentencePiece model with 16000 ids on the training split
of the corpora named in the call (the same share of bytes from each) and keeps it there; a later
call with the same words, to add a domain to the root, uses the model that is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lcl.data import corpora as registry
from lcl.data.building import build
from lcl.data.dedup import NearDuplicates
from lcl.data.domains import OWN_KINDS, Domain, corpus_domain, own_domain
from lcl.data.filters import Filter
from lcl.data.fingerprints import fingerprint
from lcl.data.journal import JOURNAL
from lcl.data.seqio_bridge import SeqioTokenizer
from lcl.data.sources import TRAIN, Ledger, SourceError
from lcl.data.store import FORMAT_VERSION, META_FILE, SPLITS, Data, Store
from lcl.data.tokenising import Work
from lcl.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    train_sentencepiece,
    write_atomically,
)

TOKENIZER_FOLDER = "tokenizer"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Text for training a tokenizer, in all: enough for 64k ids, seconds on two cores.
_TRAINING_BYTES = 32_000_000

Log = Callable[[str], None]


class PrepareError(ValueError):
    """Something that keeps the stores from being made; one line that says the mend."""


def default_cache_dir() -> str:
    """Where downloaded packages and built corpora are kept: the user's cache folder."""
    if sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.path.expanduser("~/.cache")
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or base, "lcl")


def prepare(
    corpora: Sequence[str] = (),
    *,
    root: str | os.PathLike[str],
    tokenizer: str = "byte",
    heldout_fraction: float = 0.05,
    folders: Mapping[str, str] | None = None,
    jsonl: Mapping[str, str] | None = None,
    parquet: Mapping[str, str] | None = None,
    arrayrecord: Mapping[str, str] | None = None,
    tfds: Mapping[str, str] | None = None,
    seqio: Mapping[str, str] | None = None,
    text_field: str = "text",
    filters: Sequence[Filter] = (),
    near_duplicates: NearDuplicates | None = None,
    max_document_tokens: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
    limit_documents: int | None = None,
    processes: int | None = None,
    force: bool = False,
    log: Log = print,
) -> list[Store]:
    """Makes the stores of the named corpora and of your own text.

    Args:
        corpora: names from `lcl.data.corpora.available()`.
        root: directory of the stores; made if need be.
        tokenizer: "byte", "sentencepiece:PATH.model", "hf:PATH/tokenizer.json", or
            "sentencepiece:N" to train one with N ids on the training text.
        heldout_fraction: share of the documents kept from training, 0 < f < 1.
        folders: domain name -> folder of .txt and .md files, or a pattern ("notes/**/*.rst").
        jsonl: domain name -> file, folder or pattern of .jsonl(.gz, .zst): an object a line.
        parquet: domain name -> file, folder or pattern of .parquet.
        arrayrecord: domain name -> folder of a dataset that TFDS wrote ("PATH[:SPLIT]"), or
            .array_record files of JSON objects.
        tfds: domain name -> "BUILDER[:SPLIT]".
        seqio: domain name -> "TASK[:SPLIT]", a registered SeqIO task.
        text_field: the key, column or feature that holds the text.
        filters: of `lcl.data.filters`; the first that objects drops a document.
        near_duplicates: `lcl.data.dedup.MinHash` or `Embedding`; None keeps near copies.
        max_document_tokens: longer documents are cut there (bos and eos included), and counted.
        seed: of the split; all domains that may be evaluated together should share it.
        cache_dir: for downloads and built corpora; default: the user's cache folder.
        limit_documents: at most so many documents a domain, held-out ones included: for a try.
        processes: how many tokenise; default: one a core, and one alone for bytes, which are
            copied faster than sent. The stores are the same.
        force: make the stores again, from nothing, even if they are up to date.
        log: gets a line for each thing done.

    Returns:
        The stores, both splits of each domain, in the order asked for: corpora, folders, jsonl, ...

    Raises:
        ValueError: bad input; one line that names it and the mend. What was in the root stays.
    """
    root = os.path.abspath(os.fspath(root))
    cache_dir = cache_dir or default_cache_dir()
    if not 0.0 < heldout_fraction < 1.0:
        raise PrepareError(
            f"heldout_fraction {heldout_fraction} must lie between 0 and 1: say 0.05"
        )
    if limit_documents is not None and limit_documents < 2:
        raise PrepareError(f"limit_documents {limit_documents} must be at least 2, or None")
    if max_document_tokens is not None and max_document_tokens < 3:
        raise PrepareError(
            f"max_document_tokens {max_document_tokens} must be at least 3: bos, a token, eos"
        )
    if processes is not None and processes < 1:
        raise PrepareError(f"processes {processes} must be at least 1, or None")
    split = {"heldout_fraction": heldout_fraction, "seed": seed}
    own = dict(zip(OWN_KINDS, (folders, jsonl, parquet, arrayrecord, tfds, seqio), strict=True))
    names = [name for sources in own.values() for name in sources or {}]
    _check_names([*corpora, *names], set(names))
    domains = [corpus_domain(name, split, cache_dir, log) for name in corpora]
    domains += [
        own_domain(kind, name, place, split, field=text_field)
        for kind, sources in own.items()
        for name, place in (sources or {}).items()
    ]
    if not domains:
        raise PrepareError("nothing to prepare: name a corpus, a folder or a jsonl file")
    chosen = {
        "limit_documents": limit_documents,
        "filters": [dict(one.settings()) for one in filters],
        "near_duplicates": dict(near_duplicates.settings()) if near_duplicates else None,
        "max_document_tokens": max_document_tokens,
    }
    for domain in domains:  # What was not asked for leaves no trace in the fingerprint.
        domain.settings |= {name: value for name, value in chosen.items() if value}
    try:
        os.makedirs(root, exist_ok=True)
        with _lock(root, log):
            _remove_leftovers(root)
            encoder, spec = _choose_tokenizer(tokenizer, root, domains, force, log)
            options = _Options(
                root,
                Work(encoder, tuple(filters), near_duplicates, max_document_tokens),
                spec,
                processes or _default_processes(encoder),
                limit_documents,
                force,
                log,
            )
            stores: list[Store] = []
            for domain in domains:
                stores += _make(domain, options)
    except OSError as error:
        raise PrepareError(
            f"cannot write {error.filename or root!r} ({error.strerror or error}); nothing was "
            "lost: make room or choose another root, and prepare again, which goes on from there"
        ) from error
    Data(root).tokenizer()  # All stores of the root must agree.
    return stores


def _default_processes(tokenizer: Tokenizer) -> int:
    """One a core that this process may use; bytes are copied faster than sent."""
    if isinstance(tokenizer, ByteTokenizer):
        return 1
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def show(root: str | os.PathLike[str]) -> str:
    """A table of the stores under a root, and their ledgers."""
    data = Data(os.fspath(root))
    rows = [("domain", "split", "documents", "tokens", "bytes", "fingerprint", "licence")]
    ledgers = []
    for domain in data.domains():
        for split in SPLITS:
            if not os.path.exists(os.path.join(data.root, domain, split, META_FILE)):
                continue
            store = data.open(domain, split)
            rows.append(
                (
                    domain,
                    split,
                    f"{store.num_documents:,}",
                    f"{store.num_tokens:,}",
                    f"{store.num_bytes:,}",
                    store.fingerprint[:12],
                    str(store.meta["licence"]),
                )
            )
            if split == TRAIN and store.meta["ledger"]:
                ledgers.append(f"{domain}: {Ledger.from_json(store.meta['ledger'])}")
    if len(rows) == 1:
        return f"no stores in {data.root!r}; make some with `lcl prepare`"
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    tokenizer = data.tokenizer()
    head = f"{data.root}: tokenizer {tokenizer.spec}, {tokenizer.vocab_size:,} ids"
    return "\n".join([head, "", *lines, "", *ledgers])


def _check_names(names: Sequence[str], own: set[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise PrepareError(f"domain {name!r} is named twice; give each source its own name")
        if name in own and (
            not _NAME.fullmatch(name) or ".partial-" in name or name == TOKENIZER_FOLDER
        ):
            raise PrepareError(
                f"{name!r} cannot name a domain; use letters, digits, '-', '_' and '.'"
            )
        if name in own and name in registry.available():
            raise PrepareError(
                f"{name!r} is the name of a corpus; choose another for your own text"
            )


# ---- the tokenizer of the root


def _choose_tokenizer(
    spec: str, root: str, domains: Sequence[Domain], force: bool, log: Log
) -> tuple[Tokenizer, str]:
    """The tokenizer, and the spec by which the stores name it: relative to the root."""
    made_again = {domain.name for domain in domains} if force else set()
    others = [name for name in Data(root).domains() if name not in made_again]
    there = Data(root).open(others[0]) if others else None
    kind, _, rest = spec.partition(":")
    if kind == "sentencepiece" and rest.isdecimal():
        if (
            there is not None
            and there.tokenizer_spec.startswith("sentencepiece:")
            and there.vocab_size == int(rest)
        ):
            log(f"tokenizer: the root's own SentencePiece model, {rest} ids")
            return there.tokenizer(), str(there.meta["tokenizer_spec"])
        if there is not None:
            raise _other_tokenizer(spec, root, there)
        return _train(int(rest), root, domains, log)
    tokenizer = load_tokenizer(spec)
    if there is not None and there.tokenizer_fingerprint != tokenizer.fingerprint:
        raise _other_tokenizer(spec, root, there)
    if isinstance(tokenizer, SentencePieceTokenizer):
        place = f"{TOKENIZER_FOLDER}/{tokenizer.fingerprint[:12]}.model"
        write_atomically(os.path.join(root, place), tokenizer.model)
        return tokenizer, f"sentencepiece:{place}"
    if isinstance(tokenizer, HuggingFaceTokenizer):
        place = f"{TOKENIZER_FOLDER}/{tokenizer.fingerprint[:12]}.json"
        write_atomically(os.path.join(root, place), tokenizer.data)
        return tokenizer, f"hf:{place},bos={tokenizer.bos},eos={tokenizer.eos}"
    if isinstance(tokenizer, SeqioTokenizer):
        place = f"{TOKENIZER_FOLDER}/{tokenizer.fingerprint[:12]}.model"
        write_atomically(os.path.join(root, place), tokenizer.model)
        return tokenizer, f"seqio:{place},extra_ids={tokenizer.extra_ids}"
    return tokenizer, tokenizer.spec


def _other_tokenizer(spec: str, root: str, there: Store) -> TokenizerError:
    return TokenizerError(
        f"tokenizer {spec!r} differs from the one of the stores in {root!r} "
        f"({there.meta['tokenizer_spec']}, {there.vocab_size} ids, in {there.domain}); "
        "use that one or another --root"
    )


def _train(
    vocab_size: int, root: str, domains: Sequence[Domain], log: Log
) -> tuple[Tokenizer, str]:
    """Trains SentencePiece on an equal share of bytes from each domain's training split."""
    log(f"tokenizer: training SentencePiece with {vocab_size} ids")
    started = time.monotonic()
    share = _TRAINING_BYTES // len(domains)

    def texts() -> Iterator[str]:
        for domain in domains:
            used = 0
            for text in domain.training_texts():
                used += len(text.encode("utf-8"))
                yield text
                if used >= share:
                    break

    path = os.path.join(root, TOKENIZER_FOLDER, f"sentencepiece-{vocab_size}.model")
    tokenizer = train_sentencepiece(texts(), path, vocab_size, max_bytes=2 * _TRAINING_BYTES)
    log(f"tokenizer: {path} in {time.monotonic() - started:.1f} s")
    return tokenizer, f"sentencepiece:{os.path.relpath(path, root)}"


# ---- making stores


@dataclasses.dataclass(frozen=True)
class _Options:
    """What all domains of a call have in common."""

    root: str
    work: Work
    spec: str
    processes: int
    limit_documents: int | None
    force: bool
    log: Log


def _make(domain: Domain, options: _Options) -> list[Store]:
    place = os.path.join(options.root, domain.name)
    partial = os.path.join(options.root, f".partial-{domain.name}")
    work, spec, log = options.work, options.spec, options.log
    inputs = fingerprint(
        FORMAT_VERSION, domain.settings, domain.inputs, work.tokenizer.fingerprint, spec
    )
    if not options.force and _is_current(place, inputs):
        log(f"{domain.name}: up to date")
        shutil.rmtree(partial, ignore_errors=True)
        return [Store.open(os.path.join(place, split)) for split in SPLITS]
    if options.force:
        shutil.rmtree(partial, ignore_errors=True)
    if os.path.exists(place):
        why = "asked to make it again" if options.force else "inputs or settings changed"
        log(f"{domain.name}: {why}")
    if os.path.exists(partial):
        log(f"{domain.name}: going on with what an earlier call left, as far as it is the same")
    started = time.monotonic()
    try:
        opened, ledger = build(
            domain,
            partial,
            work,
            writer_settings={
                "tokenizer_spec": spec,
                "licence": domain.licence,
                "settings": domain.settings,
                "inputs": inputs,
            },
            processes=options.processes,
            limit_documents=options.limit_documents,
            log=log,
        )
    except SourceError:
        shutil.rmtree(partial, ignore_errors=True)  # Going on with it would lead here again.
        raise
    for package, text in opened.copyrights.items():
        path = os.path.join(partial, "licences", f"{package}.txt")
        write_atomically(path, text.encode("utf-8"))
    _replace(partial, place)
    _remove_journal(place)
    stores = [Store.open(os.path.join(place, split)) for split in SPLITS]
    seconds = time.monotonic() - started
    num_tokens = sum(store.num_tokens for store in stores)
    rate = ledger.tokens_read / max(seconds, 1e-9) / 1e6
    log(f"{domain.name}: {ledger}; {num_tokens:,} tokens in {seconds:.1f} s, {rate:.1f}M tokens/s")
    return stores


def _remove_journal(place: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(place, JOURNAL))


def _is_current(place: str, inputs: str) -> bool:
    for split in SPLITS:
        path = os.path.join(place, split)
        if not os.path.exists(os.path.join(path, META_FILE)):
            return False
        if Store.open(path).meta.get("inputs") != inputs:
            return False
    _remove_journal(place)
    return True


def _replace(partial: str, place: str) -> None:
    """Puts a finished domain in its place; the old one goes when the new one is there."""
    old = os.path.join(os.path.dirname(place), f".old-{os.path.basename(place)}")
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(place):
        os.rename(place, old)
    os.rename(partial, place)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(root: str) -> None:
    """Clears what a killed call left (we hold the lock: nobody is writing it).

    An unfinished domain that has a journal stays: the call that makes the domain goes on with it.
    """
    for name in os.listdir(root):
        if name.startswith(".old-"):
            place = os.path.join(root, name.removeprefix(".old-"))
            if not os.path.exists(place):  # Killed between the two renames.
                os.rename(os.path.join(root, name), place)
        path = os.path.join(root, name)
        unfinished = name.startswith(".partial-") and os.path.exists(os.path.join(path, JOURNAL))
        if name.startswith((".old-", ".partial-")) and not unfinished:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(root: str, log: Log) -> Iterator[None]:
    """One `prepare` at a time in a root; a killed process lets go by itself."""
    import fcntl

    with open(os.path.join(root, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another `lcl prepare` in {root}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
