"""Progress of a long read: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from lcl.data.readers import Meter
from lcl.data.sources import Document

_SECONDS_A_LINE = 30.0


class ProgressBar(contextlib.AbstractContextManager):
    """How far a domain is, tokens a second, and the time left.

        en: tokens:  41%|###    | 8.2M/20.0M [00:03<00:04, 2.7MB/s, 812 documents, 2.5M tokens/s]

    On a terminal a bar; else, where a log is wanted, a line every half a minute.
    """

    def __init__(self, title: str, log: Callable[[str], None] | None = None):
        """Opens the bar.

        Args:
            title: what is being done.
            log: gets a line now and then if stderr is no terminal.
        """
        import tqdm

        self._title, self._log = title, log
        self._tqdm = tqdm.tqdm(desc=title, disable=None, leave=False, dynamic_ncols=True)
        self._documents = self._tokens = self._old_tokens = 0
        self._started = self._last_line = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._tqdm.close()

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Counts documents as they pass."""
        self._tqdm.unit = " documents"
        for document in documents:
            self._tqdm.update()
            yield document

    def at(self, meter: Meter, num_documents: int, num_tokens: int, *, fresh: bool = True) -> None:
        """Says that so many more documents and tokens are done, the reader being at `meter`.

        Args:
            meter: of the reader.
            num_documents: more.
            num_tokens: more.
            fresh: False for what an earlier process had done: it does not count for the speed.
        """
        self._documents += num_documents
        self._tokens += num_tokens
        self._old_tokens += 0 if fresh else num_tokens
        now = time.monotonic()
        rate = (self._tokens - self._old_tokens) / max(1e-9, now - self._started)
        if not self._tqdm.disable:
            self._tqdm.total, self._tqdm.unit = meter.total, meter.unit
            self._tqdm.unit_scale = meter.unit == "B"
            words = f"{self._documents:,} documents, {rate / 1e6:.1f}M tokens/s"
            self._tqdm.set_postfix_str(words, refresh=False)
            self._tqdm.update(max(0, meter.done - self._tqdm.n))
        elif self._log is not None and now - self._last_line > _SECONDS_A_LINE:
            self._last_line = now
            self._log(self._line(meter, rate, now))

    def _line(self, meter: Meter, rate: float, now: float) -> str:
        line = f"{self._title}: {self._documents:,} documents, {self._tokens:,} tokens"
        line += f", {rate / 1e6:.1f}M tokens/s"
        if meter.total and meter.done:
            left = (now - self._started) * max(0, meter.total - meter.done) / meter.done
            line += f", {100 * meter.done / meter.total:.0f}%, about {left:.0f} s left"
        return line
