"""What one stage of a run reads: a frozen description, and the checks it must pass.

Everything here is refused at once when it cannot work, with the reason: before a store is opened.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcl.data.decomposition import Decomposition
from lcl.data.mixture import AnyMixture, Mixture
from lcl.data.packing import METHODS
from lcl.data.replay import Replay

ORDERS = ("shuffle", "stored")
# The longest block that a bucket's mixture may need to keep the share of its rarest domain.
MAX_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class StageData:
    """What one stage of a run reads.

    Attributes:
        mixture: domain weights (`lcl.data.mixture`), constant or a function of the stage's rows.
        sequence_length: T, transitions of a row, >= 2.
        batch_size: new rows a step (all rows a step with `Replay(mode="substitute")`), in the whole
            run, not for each host or device.
        packing: how documents become rows, see `lcl.data.packing.pack`.
        document_mask: a document attends to itself only, and its positions start at 0; False makes
            the row one segment.
        replay: None, or how much comes from the earlier stages.
        order: "shuffle", or "stored" to keep documents as the store has them, or an object that
            orders them (`lcl.data.ordering`): which documents are neighbours in a row. The rows are
            shuffled either way.
        decomposition: None, or power-of-two rows of one document each
            (`lcl.data.decomposition.Decomposition`); `packing` and `order` have no part in it.
        transforms: functions of the finished batch, applied in turn: positions, windows, prompts.
    """

    mixture: AnyMixture
    sequence_length: int
    batch_size: int
    packing: str = "best_fit"
    document_mask: bool = True
    replay: Replay | None = None
    order: Any = "shuffle"
    decomposition: Decomposition | None = None
    transforms: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}; give at least 2")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give at least 1")
        if self.packing not in METHODS:
            raise ValueError(f"packing {self.packing!r} is unknown; use {' or '.join(METHODS)}")
        if self.replay is not None:
            self.replay.rows_per_step(self.batch_size)  # refuses a fraction that is not whole rows
        object.__setattr__(self, "transforms", tuple(self.transforms))
        self._check_order()
        self._check_transforms()
        if self.decomposition is not None:
            self._check_decomposition(self.decomposition)

    def _check_order(self) -> None:
        if isinstance(self.order, str):
            if self.order not in ORDERS:
                raise ValueError(
                    f"order {self.order!r} is unknown; use {' or '.join(ORDERS)}, or an object "
                    "that orders documents"
                )
            return
        name = type(self.order).__name__
        if not callable(getattr(self.order, "order", None)):
            raise ValueError(
                f"order is {self.order!r}; use {' or '.join(ORDERS)}, or an object with a method "
                "`order`"
            )
        if self.decomposition is not None:
            raise ValueError(
                f"order {name} has no effect with decomposition, whose rows hold one document "
                "each; use order='shuffle'"
            )
        if not self.order.needs_open_rows:
            return
        if self.document_mask:
            raise ValueError(
                f"order {name} puts related documents into one row, but document_mask=True cuts "
                "attention between them and the order would have no effect; set "
                "document_mask=False"
            )
        if self.packing != "concat":
            raise ValueError(
                f"order {name} is a path through the documents, and packing {self.packing!r} "
                "takes it apart; use packing='concat'"
            )

    def _check_transforms(self) -> None:
        for transform in self.transforms:
            if not (callable(transform) and hasattr(transform, "content_length")):
                raise ValueError(
                    f"transform {transform!r} is none; give objects such as SkyLadder(...)"
                )
        if self.content_length < 2:
            raise ValueError(
                f"the transforms leave {self.content_length} cells of a row of "
                f"{self.sequence_length} for documents; lengthen sequence_length"
            )

    def _check_decomposition(self, decomposition: Decomposition) -> None:
        if self.sequence_length != 2**decomposition.max_log2:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, but the decomposition's longest rows "
                f"have {2**decomposition.max_log2}; make sequence_length 2**max_log2"
            )
        if self.packing != "best_fit":
            raise ValueError(
                f"packing {self.packing!r} has no effect with decomposition, whose rows hold one "
                "document each; leave packing out"
            )
        for length in decomposition.row_lengths:
            if self._content_length(length) != length:
                names = ", ".join(type(t).__name__ for t in self.transforms)
                raise ValueError(
                    f"transforms {names} need room in each row, but a decomposition's rows are "
                    "full; leave one of the two out"
                )
        scaled_mixture(self.mixture, dict.fromkeys(self.mixture.domains, 1.0))
        for domain, part in self.mixture.subsets.items():
            if part.epochs is not None:
                raise ValueError(
                    f"subset of {domain!r} is sized by epochs={part.epochs}, but a decomposition's "
                    "rows have several lengths; give its size in tokens"
                )

    @property
    def content_length(self) -> int:
        """How many cells of a row documents may fill; the transforms may need the others."""
        return self._content_length(self.sequence_length)

    def _content_length(self, length: int) -> int:
        for transform in self.transforms:
            length = transform.content_length(length)
        return length

    @property
    def depends_on_length(self) -> bool:
        """Whether the number of steps decides any batch: a curriculum, a growing window."""
        return self.decomposition is not None or bool(self.transforms) or self.mixture.needs_length

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the batches, as plain values to be hashed."""
        mixture, replay, order = self.mixture, self.replay, self.order
        constant = type(mixture) is Mixture
        settings: dict[str, Any] = {
            **(mixture.settings() if constant else {"mixture": named_settings(mixture)}),
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "packing": self.packing,
            "document_mask": self.document_mask,
            "replay": None if replay is None else replay.settings(),
            "order": order if isinstance(order, str) else named_settings(order),
        }
        if self.decomposition is not None:
            settings["decomposition"] = self.decomposition.settings()
        if self.transforms:
            settings["transforms"] = [named_settings(t) for t in self.transforms]
        return settings


def named_settings(value: Any) -> list[Any]:
    """Return an object's kind and its settings as plain values."""
    return [type(value).__name__, value.settings()]


def scaled_mixture(mixture: AnyMixture, factors: Mapping[str, float]) -> AnyMixture:
    """A mixture whose weights are multiplied by `factors`, without the domains that have none.

    A bucket of a decomposition has its own shares of the domains: a domain of short documents gives
    the short buckets more. Mixtures made of others (stages of them, one that turns into another)
    have each of theirs scaled.

    Args:
        mixture: a `Mixture`, or a frozen dataclass that has some in its fields.
        factors: domain -> factor > 0.

    Returns:
        A mixture of the same kind. Domains so rare that they cannot be kept exact in blocks of
        65,536 rows are left out; otherwise the block grows until each has its share.

    Raises:
        ValueError: there is no `Mixture` in it to scale.

    Example:
        >>> scaled_mixture(Mixture({"a": 1, "b": 1}), {"a": 0.5, "b": 0.25}).weights
        {'a': 0.5, 'b': 0.25}
    """
    scaled_fn = getattr(mixture, "scaled", None)
    if scaled_fn is not None:
        return scaled_fn(factors)
    if type(mixture) is not Mixture:
        raise ValueError(
            f"decomposition needs a mixture whose weights can be scaled bucket by bucket, not "
            f"{type(mixture).__name__}; use Mixture"
        )
    weights = {d: w * factors[d] for d, w in mixture.weights.items() if d in factors}
    total = sum(weights.values())
    weights = {d: w for d, w in weights.items() if w / total * MAX_BLOCK >= 1}
    total = sum(weights.values())
    block = max(mixture.block, math.ceil(total / min(weights.values())))
    return dataclasses.replace(mixture, weights=weights, block=block)


def mean_shares(mixture: AnyMixture, num_rows: int, row_length: int) -> np.ndarray:
    """Each domain's share of a stage of `num_rows` rows, float64[D], in the order of `domains`."""
    if type(mixture) is Mixture:
        weights = np.array([float(mixture.weights[d]) for d in mixture.domains])
    else:
        weights = mixture.bind(num_rows, row_length).counts_before(num_rows).astype(np.float64)
    return weights / weights.sum()
