"""Held-out loss of every domain: which rows, how they are summed, in which units.

    held-out store of domain d -> the first rows of its layout, always the same -> [Batch, ...]
    eval_step(params, batch)   -> {"nll_sum_by_source": f32[2 D], "weight_by_source": f32[2 D], ...}
    sums over the batches      -> nats/token = nll / tokens;  bits/byte = nll / ln 2 / bytes

Bytes are the UTF-8 bytes the *scored* targets stand for, so bits/byte compares models with
different tokenizers and texts in different languages; nats/token does neither. The end-of-document
token stands for 0 bytes, yet predicting it costs nats: they count, as a compressor would have to
pay for them too. Stored documents begin with bos, so their first real token is scored too; bos
itself never is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.evals.branches import Branches
from lcl.evals.samples import Samples
from lcl.parallel.run_ahead import SMALL_PROGRAMS, RunAhead

if TYPE_CHECKING:
    from lcl.data.batch import Batch
    from lcl.data.store import Data

EvalStep = Callable[[Any, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class HeldOut:
    """Which held-out rows are scored, and how often.

    Args:
        every_steps: also evaluate every so many steps within a stage (the interval is part of any
            stability-gap number); None = only at the start and after each stage.
        rows_per_domain: rows a domain, the same ones each time; fewer where the store has fewer.
        sequence_length: tokens a row.
        batch_size: rows a batch. Short last batches are padded, so one shape compiles once.
        domains: None = all of the run's; or names, which may include domains no stage trains.
        branches: also evaluate annealed copies (`lcl.evals.Branches`); None = none.
        samples: also write continuations at stage ends (`lcl.evals.Samples`); None = none.
    """

    every_steps: int | None = None
    rows_per_domain: int = 64
    sequence_length: int = 512
    batch_size: int = 8
    domains: Sequence[str] | None = None
    branches: Branches | None = None
    samples: Samples | None = None

    def __post_init__(self) -> None:
        for name in ("rows_per_domain", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"HeldOut.{name}={value!r} must be a whole number of at least 1")
        every = self.every_steps
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f"HeldOut.every_steps={every!r} must be at least 1, or None for stage ends only"
            )
        if self.domains is not None:
            if isinstance(self.domains, str):
                raise ValueError(
                    f"HeldOut.domains={self.domains!r} must be a list of names: [{self.domains!r}]"
                )
            object.__setattr__(self, "domains", tuple(self.domains))
            if not self.domains or len(set(self.domains)) != len(self.domains):
                raise ValueError(
                    f"HeldOut.domains={list(self.domains)} must name each domain once; "
                    "None = all of the run's"
                )

    def due(self, step: int) -> bool:
        """Is an interval evaluation due after `step` updates? (Stage ends are the caller's.)"""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0

    def batches(self, data: Data, domains: Sequence[str]) -> EvalBatches:
        """The fixed batches of every evaluated domain, built once a run.

        Args:
            data: where the stores are.
            domains: the run's domains in the order of their source ids (`stream.domains`); domains
                of `self.domains` that the run never trains get the id 0, which nothing reads.

        Returns:
            EvalBatches, a mapping {domain: (Batch, ...)}.

        Raises:
            ValueError: a domain without a held-out store, or one whose held-out store is empty.
        """
        from lcl.data.batch import eval_batches

        run_domains = tuple(domains)
        chosen = run_domains if self.domains is None else tuple(self.domains)
        batches = {}
        table = None
        for domain in chosen:
            store = data.open(domain, split="heldout")
            if store.num_documents == 0:
                raise ValueError(
                    f"domain {domain!r} has an empty held-out split: prepare it with a larger "
                    "heldout_fraction, or leave it out of HeldOut.domains"
                )
            batches[domain] = tuple(
                eval_batches(
                    store,
                    num_rows=self.rows_per_domain,
                    sequence_length=self.sequence_length,
                    batch_size=self.batch_size,
                    source_id=run_domains.index(domain) if domain in run_domains else 0,
                )
            )
            table = store.token_num_bytes if table is None else table
        return EvalBatches(batches, token_num_bytes=table)


class EvalBatches(Mapping):
    """{domain: (Batch, ...)} with the tokens and bytes its weighted targets stand for.

    Args:
        batches: per domain the batches; their weights are 0 at padding.
        token_num_bytes: int[vocab_size], UTF-8 bytes each token stands for (specials 0), or None
            when bytes are not known: bits/byte is then None.
        put: applied to each batch as it is handed to the step, to place it on a mesh.

    >>> from types import SimpleNamespace as B
    >>> row = B(targets=np.array([[1, 2, 0]]), loss_weights=np.array([[1.0, 1.0, 0.0]]))
    >>> e = EvalBatches({"en": [row]}, token_num_bytes=np.array([0, 3, 0]))
    >>> e.tokens["en"], e.num_bytes["en"]
    (2, 3)
    """

    def __init__(
        self,
        batches: Mapping[str, Sequence[Batch]],
        *,
        token_num_bytes: np.ndarray | None,
        put: Callable[[Any], Any] | None = None,
    ) -> None:
        self._batches = {d: tuple(bs) for d, bs in batches.items()}
        self._table = token_num_bytes
        self.put = put
        self.tokens: dict[str, int | float] = {}
        self.num_bytes: dict[str, int | float | None] = {}
        for domain, some in self._batches.items():
            tokens, num_bytes = 0.0, 0.0
            for batch in some:
                weights = np.asarray(batch.loss_weights, dtype=np.float64)
                tokens += float(weights.sum())
                if token_num_bytes is not None:
                    sizes = np.asarray(token_num_bytes)[np.asarray(batch.targets)]
                    num_bytes += float((sizes * weights).sum())
            if tokens == 0:
                raise ValueError(
                    f"domain {domain!r} has no held-out token to score: prepare more text, "
                    "or leave it out of HeldOut.domains"
                )
            self.tokens[domain] = _whole(tokens)
            self.num_bytes[domain] = None if token_num_bytes is None else _whole(num_bytes)

    def __getitem__(self, domain: str) -> tuple[Batch, ...]:
        return self._batches[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def with_put(self, put: Callable[[Any], Any]) -> EvalBatches:
        """The same batches, each passed through `put` (say, onto the mesh) before the step."""
        return EvalBatches(self._batches, token_num_bytes=self._table, put=put)


def summarise(
    nll_sum: float, tokens: int | float, num_bytes: int | float | None
) -> dict[str, int | float | None]:
    """Sums of one domain -> its line in evals.jsonl.

    Args:
        nll_sum: sum over scored targets of weight * -log p, in nats.
        tokens: sum of the weights.
        num_bytes: UTF-8 bytes of the scored targets (end-of-document: 0); None or 0 = unknown.

    Returns:
        {"nats_per_token", "bits_per_byte" (None without bytes), "tokens", "bytes"}.

    >>> summarise(math.log(2) * 8, 4, 2)["bits_per_byte"]
    4.0
    """
    return {
        "nats_per_token": nll_sum / tokens,
        "bits_per_byte": nll_sum / math.log(2) / num_bytes if num_bytes else None,
        "tokens": tokens,
        "bytes": num_bytes,
    }


def evaluate(
    eval_step: EvalStep, params: Any, batches: EvalBatches
) -> dict[str, dict[str, int | float | None]]:
    """Held-out loss of every domain by the run's own jitted forward.

    Args:
        eval_step: (params, batch) -> {"nll_sum_by_source": f32[S], "weight_by_source": f32[S]} on
            the device; jitted by the caller, one shape for all domains.
        params: handed on untouched.
        batches: what `HeldOut.batches` built.

    Returns:
        {domain: {"nats_per_token", "bits_per_byte", "tokens", "bytes"}}. A few steps are under
        way at once; each domain's sums come back in one transfer and are added in float64 in batch
        order, so the result does not depend on timing.

    Raises:
        ValueError: the step scored another number of tokens than the batches hold (a loss that
            drops or repeats tokens would otherwise go unseen).
    """
    import jax

    pending: dict[str, list[tuple[Any, Any]]] = {}
    ahead = RunAhead(SMALL_PROGRAMS)
    for domain, some in batches.items():
        pending[domain] = []
        for batch in some:
            aux = eval_step(params, batches.put(batch) if batches.put else batch)
            pending[domain].append((aux["nll_sum_by_source"], aux["weight_by_source"]))
            ahead.add(pending[domain][-1])
    results = {}
    for domain, sums in pending.items():
        host = jax.device_get(sums)
        nll = sum(float(np.asarray(n, np.float64).sum()) for n, _ in host)
        weight = sum(float(np.asarray(w, np.float64).sum()) for _, w in host)
        tokens = batches.tokens[domain]
        if abs(weight - tokens) > 1e-3 + 1e-5 * tokens:
            raise ValueError(
                f"the evaluation of {domain!r} scored {weight:g} tokens of {tokens:g}: "
                "nll_sum_by_source and weight_by_source must cover every source of the batch"
            )
        results[domain] = summarise(nll, tokens, batches.num_bytes[domain])
    return results


def _whole(x: float) -> int | float:
    return int(x) if x == int(x) else x
