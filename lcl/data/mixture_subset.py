"""Subsets: a stage that reads a part of a domain several times instead of all of it once.

The stability gap's remedy (arXiv:2406.14833): several epochs over a properly sized subset, of the
best documents, recover sooner than one epoch over everything, at the same number of steps.

    domain, by rank      d7 d2 d9 d0 d4 d1 ...        a score of each document, or a keyed shuffle
    epochs=4, and the    |d7 d2 d9|                   the stage takes 12 rows of the domain: 3 rows'
    stage takes 12 rows   3 rows                      worth of the best, each of them 4 times
    read                 r1 r0 r2 | r2 r1 r0 | r0 r2 r1 | r2 r0 r1

A subset is only another plan of the domain: documents outside it count as empty, so packing, order,
epochs, ledger and replay work on it as on the whole.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcl.data.mixture import AnyMixture, BoundMixture
from lcl.data.ordering import named_key, shuffle_with_key
from lcl.data.packing import Layout
from lcl.data.scores import PREFIX, read_scores


@dataclasses.dataclass(frozen=True)
class Subset(AnyMixture):
    """A mixture in which one domain is cut down to a part that is read again and again.

    The mixture's shares stay what they are. For more than one domain put one Subset into another.
    A stage with the same part goes on where the stage before left it; another part begins anew.

    Attributes:
        mixture: which domain each row comes from.
        domain: the one that is cut down.
        epochs: how often the stage reads each row of the part (the last few rows once less, if it
            does not come out even): the part is as large as that makes it.
        tokens: or how large the part is; then the stage reads it as often as it comes to.
        by: how documents are ranked: "seed", a shuffle by the run's seed; the name of a number that
            the corpus recorded for each document (`Store.extra`), such as a quality; or
            "scores:NAME", a number that was found out later (`lcl.data.scores`), such as the loss
            of a reference model (`lcl score`).
        best: "high" or "low": which end of the ranking is taken first, ties by document number.
        share: at most this share of the documents, by rank, may be in the part: 0.5 with best="low"
            and a perplexity is the better half. Alone it is the part; `tokens` beside it is a
            cap, which a short share does not reach.

    Example:
        >>> from lcl.data.mixture import Mixture
        >>> mixture = Subset(Mixture({"web": 1, "medicine": 1}), "medicine", epochs=4)
        >>> mixture.rows_of(count=4000)
        1000
    """

    mixture: AnyMixture
    domain: str
    epochs: int | None = None
    tokens: int | None = None
    by: str = "seed"
    best: str = "high"
    share: float | None = None

    def __post_init__(self) -> None:
        if self.domain not in self.mixture.domains:
            raise ValueError(
                f"subset of {self.domain!r}, which the mixture does not have; use one of "
                f"{', '.join(self.mixture.domains)}"
            )
        if self.domain in self.mixture.subsets:
            raise ValueError(f"two subsets of {self.domain!r} are one in the other; use one")
        sizes = (self.epochs is not None) + (self.tokens is not None)
        if sizes == 2 or (sizes == 0 and self.share is None):
            raise ValueError(
                f"subset of {self.domain!r} has epochs={self.epochs} and tokens={self.tokens}; "
                "give one of the two"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"subset share is {self.share}; give more than 0 and at most 1")
        for name in ("epochs", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"subset {name} is {value}; give at least 1")
        if self.best not in ("high", "low"):
            raise ValueError(f"subset's best is {self.best!r}; use 'high' or 'low'")

    @property
    def domains(self) -> tuple[str, ...]:
        return self.mixture.domains

    @property
    def needs_length(self) -> bool:  # type: ignore[override]
        return self.epochs is not None or self.mixture.needs_length

    @property
    def subsets(self) -> Mapping[str, Subset]:
        """This one, and those of the mixture inside."""
        return types.MappingProxyType({**self.mixture.subsets, self.domain: self})

    def bind(self, num_rows: int, row_length: int | None = None) -> BoundMixture:
        return self.mixture.bind(num_rows, row_length)

    def scaled(self, factors: Mapping[str, float]) -> AnyMixture:
        """Multiply each domain's weights in the mixture inside, and leave out those without."""
        from lcl.data.stage_data import scaled_mixture  # which imports the mixtures

        inner = scaled_mixture(self.mixture, factors)
        if self.domain not in inner.domains:
            return inner
        return dataclasses.replace(self, mixture=inner)

    def settings(self) -> dict[str, Any]:
        return {"mixture": self.mixture.settings(), "subset of": self.domain, **self._part()}

    def _part(self) -> dict[str, Any]:
        size = {"epochs": self.epochs} if self.tokens is None else {"tokens": self.tokens}
        share = {} if self.share is None else {"share": self.share}
        return {**size, "by": self.by, "best": self.best, **share}

    # ---- what the planner asks -------------------------------------------------------------------

    def rows_of(self, count: int) -> int | None:
        """How many rows the part has if the stage takes `count` rows; None: what `tokens` makes."""
        return None if self.epochs is None else -(-count // self.epochs)

    def name(self, count: int) -> tuple[Any, ...]:
        """What decides the part, for the name of its plan."""
        size = ("tokens", self.tokens) if self.epochs is None else ("rows", self.rows_of(count))
        share = () if self.share is None else (self.share,)
        return ("subset", *size, self.by, self.best, *share)

    def ranked_by(self, store: Any) -> tuple[str, ...]:
        """What else decides the part: the fingerprint of the scores, which may be made anew."""
        if not self.by.startswith(PREFIX):
            return ()
        return (read_scores(store, self.by.removeprefix(PREFIX)).fingerprint,)

    def lengths(
        self, store: Any, lengths: np.ndarray, *, seed: int, row_length: int, count: int
    ) -> np.ndarray:
        """Make the documents outside the part empty.

        Args:
            store: the domain's; asked for `extra(by)`.
            lengths: int64[N], transitions of each document.
            seed: the run's; names the shuffle.
            row_length: T of the stage's rows.
            count: rows of the domain that the stage takes.

        Returns:
            int64[N]: the lengths, with 0 for the documents that are left out. The part is the first
            documents by rank that have the tokens together: the last of them goes over. With a
            share, none behind it.

        Raises:
            ValueError: the domain has fewer tokens; the scores do not fit or are not numbers.
        """
        rows, rank = self.rows_of(count), self._ranking(store, len(lengths), seed)
        if self.share is not None:
            rank = rank[: math.ceil(self.share * len(rank))]
        total = int(lengths[rank].sum())
        needed = self.tokens if rows is None else rows * row_length
        if self.share is not None and rows is None:
            needed = total if needed is None else min(needed, total)
        assert needed is not None
        if total < needed:
            epochs = -(-count // max(1, total // row_length))
            has = "domain has" if self.share is None else f"best {self.share:.4g} of it has"
            raise ValueError(
                f"subset of {self.domain!r} needs {needed:,} tokens, but the {has} {total:,}; "
                + (f"give tokens={total} or less" if rows is None else f"give epochs={epochs}")
                + (", or prepare more documents" if self.share is None else ", or a larger share")
            )
        last = int(np.searchsorted(np.cumsum(lengths[rank]), needed))
        inside = np.zeros_like(lengths)
        inside[rank[: last + 1]] = lengths[rank[: last + 1]]
        return inside

    def _ranking(self, store: Any, num_documents: int, seed: int) -> np.ndarray:
        if self.by == "seed":
            key = named_key("subset", seed, self.domain, bits=128)
            rank = shuffle_with_key(num_documents, key)
            return rank if self.best == "high" else rank[::-1]
        if self.by.startswith(PREFIX):
            found = read_scores(store, self.by.removeprefix(PREFIX)).values
        else:
            found = store.extra(self.by)
        score = np.asarray(found, np.float64)
        if len(score) != num_documents or not np.isfinite(score).all():
            raise ValueError(
                f"{self.by!r} of {self.domain!r} is not a finite number for every document; "
                "prepare it again, or rank by another"
            )
        return np.argsort(score if self.best == "low" else -score, kind="stable")

    def cut(self, layout: Layout, count: int) -> Layout:
        """Leave as many rows of the part's layout as `epochs` asks for: the fullest ones.

        Padding makes some rows more than the tokens need; those that hold least go.
        """
        rows = self.rows_of(count)
        if rows is None or rows == layout.num_rows:
            return layout
        if rows > layout.num_rows:  # only if the order of documents leaves some out
            raise ValueError(
                f"subset of {self.domain!r} needs {rows:,} rows, but its documents make "
                f"{layout.num_rows:,} in this order; use order='shuffle' or more epochs"
            )
        fullest = np.argsort(-layout.tokens_in(np.arange(layout.num_rows)), kind="stable")
        slices = layout.rows(np.sort(fullest[:rows]))
        row_offsets = np.append(0, np.cumsum(np.bincount(slices.row, minlength=rows)))
        return Layout(layout.row_length, row_offsets, slices.document, slices.start, slices.length)
