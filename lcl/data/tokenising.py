"""Parts of documents to tokens, in this process or in several; the result is the same bytes.

    documents -> parts of about a megabyte -> worker 0, 1, 0, 1, ... -> results in the parts' order

What is done here to a document is a function of its text alone (filters, tokens, signature); what
depends on other documents (is it a duplicate? where is it written?) is decided by the one process
that reads the results in order. So neither the number of processes nor their speed can show.

A worker is `python -m lcl.data.tokenising`: it reads pickled parts from its stdin and writes
results to its stdout, and ends when its stdin does, so a killed parent leaves none behind.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lcl.data.dedup import NearDuplicates
from lcl.data.filters import Filter
from lcl.data.tokenizers import Tokenizer, load_tokenizer

CHUNK_CHARACTERS = 1 << 20  # Longer texts are encoded piece by piece.
# Fewer parts are done here before another process has begun (a second).
_WORTH_A_PROCESS = 3


class TokenisingError(ValueError):
    """Processes that cannot tokenise; one line with the mend."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done to each document.

    Attributes:
        tokenizer: encodes it.
        filters: the first that gives a reason drops it.
        near_duplicates: makes its signature; None: there is no such stage.
        max_tokens: longer documents are cut to so many tokens, bos and eos included.
    """

    tokenizer: Tokenizer
    filters: tuple[Filter, ...] = ()
    near_duplicates: NearDuplicates | None = None
    max_tokens: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """The type of stored tokens: uint16 where all ids fit."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def reason(self, text: str) -> str | None:
        """Why a filter drops this text; None if none does."""
        for one in self.filters:
            why = one.reason(text)
            if why is not None:
                return why
        return None


class Part(NamedTuple):
    """Some documents: their texts as UTF-8; which may be kept (others' tokens are counted only)."""

    texts: list[bytes]
    fit: list[bool]


class Encoded(NamedTuple):
    """A part's documents as tokens.

    Attributes:
        tokens: of all documents that are fit and passed the filters, bos and eos included.
        num_tokens: int64 [N], of every document, after cutting.
        cut: int64 [N], tokens cut off.
        num_bytes: int64 [N], UTF-8 bytes that the tokens stand for.
        reasons: of the filters, N.
        signatures: of the documents in `tokens`, in their order; None without that stage.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    cut: np.ndarray
    num_bytes: np.ndarray
    reasons: list[str | None]
    signatures: np.ndarray | None


def pieces(text: str) -> Iterator[str]:
    r"""Cuts a very long text where a line begins with a letter: there, tokens do not cross.

    "one\n two\nthree"  ->  "one\n two\n" | "three"        (had it been a million characters)
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        end = start + CHUNK_CHARACTERS
        cut = text.rfind("\n", start, end)
        while cut > start and text[cut + 1 : cut + 2].isspace():
            cut = text.rfind("\n", start, cut)
        cut = cut + 1 if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def encode_pieces(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    """The tokens of a text, a million characters at a time where the tokenizer allows it."""
    for piece in pieces(text) if tokenizer.can_chunk else (text,):
        yield tokenizer.encode(piece)


def encode_part(work: Work, part: Part) -> Encoded:
    """Filters, tokenises and signs the documents of a part: a pure function.

    ["one", "two", "bad"], fit [yes, yes, no]  ->  tokens  B o n e E B t w o E
                                                   num_tokens 5 5 5     ("bad" is counted only)
    """
    tokenizer = work.tokenizer
    texts = [data.decode("utf-8") for data in part.texts]
    reasons = [
        work.reason(text) if fit else None for text, fit in zip(texts, part.fit, strict=True)
    ]
    ids = _encode_all(tokenizer, texts)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + 2
    num_tokens = lengths if work.max_tokens is None else np.minimum(lengths, work.max_tokens)
    num_bytes = np.fromiter(map(len, part.texts), np.int64, len(ids))
    for i in np.flatnonzero(num_tokens < lengths).tolist():
        ids[i] = ids[i][: num_tokens[i] - 2]
        num_bytes[i] = int(tokenizer.token_num_bytes[ids[i]].sum())
    written = [i for i, fit in enumerate(part.fit) if fit and reasons[i] is None]
    tokens = np.empty(int(num_tokens[written].sum()), work.dtype)
    start = 0
    for i in written:
        end = start + int(num_tokens[i])
        tokens[start] = tokenizer.bos_id
        tokens[start + 1 : end - 1] = ids[i]
        tokens[end - 1] = tokenizer.eos_id
        start = end
    near, signatures = work.near_duplicates, None
    if near is not None and near.in_workers:
        signatures = near.signatures([texts[i] for i in written])
    return Encoded(tokens, num_tokens, lengths - num_tokens, num_bytes, reasons, signatures)


def _encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    short = [text for text in texts if len(text) <= CHUNK_CHARACTERS]
    rows = iter(tokenizer.encode_batch(short))
    return [
        next(rows)
        if len(text) <= CHUNK_CHARACTERS
        else np.concatenate(list(encode_pieces(tokenizer, text)))
        for text in texts
    ]


# ---- several processes


class Workers:
    """Encodes parts in `processes` processes; results come in the order of the parts.

    >>> with Workers(Work(tokenizer), processes=2) as workers:  # doctest: +SKIP
    ...     for part, encoded in workers.map(parts):
    ...         ...
    """

    def __init__(self, work: Work, processes: int = 1):
        """Processes start when the first part comes; with one, this process does the work."""
        if processes < 1:
            raise TokenisingError(f"processes {processes} must be at least 1")
        self._work, self._processes = work, processes
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all: list[_Worker] = []
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._all:
            worker.stop(kill=kind is not None)
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def map(self, parts: Iterable[tuple[Any, Part]]) -> Iterator[tuple[Any, Encoded]]:
        """(tag, part) to (tag, result), lazily: at most two parts a process are under way."""
        parts = iter(parts)
        first = list(itertools.islice(parts, _WORTH_A_PROCESS))
        parts = itertools.chain(first, parts)
        if self._processes == 1 or len(first) < _WORTH_A_PROCESS:
            for tag, part in parts:
                yield tag, encode_part(self._work, part)
            return
        if self._threads is None:
            job = _pickled_job(self._work)
            self._threads = concurrent.futures.ThreadPoolExecutor(self._processes)
            self._all = [_Worker(job) for _ in range(self._processes)]
            for worker in self._all:
                self._idle.put(worker)
        running: collections.deque[tuple[Any, concurrent.futures.Future[Encoded]]]
        running = collections.deque()
        while True:
            for tag, part in itertools.islice(parts, 2 * self._processes - len(running)):
                running.append((tag, self._threads.submit(self._ask, part)))
            if not running:
                return
            tag, future = running.popleft()
            yield tag, future.result()

    def _ask(self, part: Part) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.ask(part)
        finally:
            self._idle.put(worker)


def _pickled_job(work: Work) -> bytes:
    # The tokenizer travels by name: its library's objects do not pickle.
    try:
        rest = dataclasses.replace(work, tokenizer=None)  # type: ignore[arg-type]
        return pickle.dumps((sys.path, work.tokenizer.spec, rest))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TokenisingError(
            f"filters or near_duplicates cannot be sent to other processes ({error}); define them "
            "in a module, or use processes=1"
        ) from error


class _Worker:
    """One child process."""

    def __init__(self, job: bytes):
        # Its cores are its own: no library's threads on top of the processes.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lcl.data.tokenising"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send_job: bytes | None = job

    def ask(self, part: Part) -> Encoded:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            if self._send_job is not None:
                stdin.write(self._send_job)
                self._send_job = None
            pickle.dump(part, stdin, protocol=5)
            stdin.flush()
            kind, value = pickle.load(stdout)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
            raise TokenisingError(
                "a tokenising process died (out of memory, or killed); prepare again, which goes "
                "on where it stopped, with fewer --processes"
            ) from error
        if kind == "error":
            raise TokenisingError(value)
        return value

    def stop(self, *, kill: bool) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if kill:
            self._process.kill()
        try:
            self._process.stdin.close()
        except OSError:  # It died with something unsent.
            pass
        self._process.wait()
        self._process.stdout.close()


def _serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """A worker's life: a job, then parts until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears it too, and ends us.
    work: Work | None = None
    failure = ""
    try:
        sys.path[:], spec, work = pickle.load(stdin)
        work = dataclasses.replace(work, tokenizer=load_tokenizer(spec))
    except EOFError:
        return
    except Exception as error:
        failure = (
            f"a tokenising process cannot begin ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); define filters in a module that can be "
            "imported, or use processes=1"
        )
    while True:
        try:
            part = pickle.load(stdin)
        except EOFError:
            return
        answer: tuple[str, Any]
        if work is None or failure:
            answer = "error", failure
        else:
            try:
                answer = "ok", encode_part(work, part)
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                answer = (
                    "error",
                    text
                    if isinstance(error, ValueError)
                    else (f"tokenising failed ({type(error).__name__}: {text})"),
                )
        pickle.dump(answer, stdout, protocol=5)
        stdout.flush()


def _main() -> None:
    # Whatever a library prints must not come between the results.
    out = os.fdopen(os.dup(1), "wb", 1 << 20)
    os.dup2(2, 1)
    with open(0, "rb", 1 << 20, closefd=False) as stdin:
        _serve(stdin, out)


if __name__ == "__main__":
    # Under its importable name, so that what is pickled has one.
    from lcl.data import tokenising

    try:
        tokenising._main()
    except BrokenPipeError:  # The parent has gone.
        os._exit(1)
