"""Investigating Continual Pretraining (2402.17400), small: similar domains in a row, or any order?

    lcl reproduce domain_order

A model is pretrained on documentation of Python, then reads six domains, one after the other: three
languages of manual pages and of LibreOffice's help. They are alike in two ways, by language and by
subject; how alike is measured on their text, and so is the order of the similar arm:

    similar      after each domain the most similar one that is left
    random       a shuffle, another one for each seed
    each alone   from the pretrained model, one domain and nothing else: six runs

               pydoc | man-en help-en help-fr man-fr man-de help-de       similar
               pydoc | help-de man-en man-fr help-en man-de help-fr       random

The learning rate is constant after its warm-up, so that no place in the order is a better one. The
measured result stands in configs/papers/domain_order.gin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.data import Data
from lcl.data.embeddings import HashedTfidf
from lcl.data.ordering import named_key
from lcl.optim import AdamW, wsd
from lcl.papers import streams
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import StreamPaper
from lcl.papers.streams import Corpora, MadeUp, Prepared
from lcl.stages import Stage

if TYPE_CHECKING:
    import pathlib

SIMILAR, RANDOM, ALONE = "similar order", "random order", "each alone"
PRETRAINING = "pretraining"
_FINDINGS = "2402.17400, abstract and conclusions; no number of its figures was read"


def _claim(
    name: str, text: str, better: str, worse: str, metric: str, published: str = ""
) -> Claim:
    source = _FINDINGS if published else ""
    return Claim(name, text, better, worse, metric, published=published, source=source)


@dataclasses.dataclass(frozen=True)
class DomainOrder(StreamPaper):
    """The experiment's sizes (`StreamPaper`); the first of `corpora` is what is pretrained on.

    Attributes:
      pretraining_steps: of the first stage.
    """

    corpora: Corpora = Prepared(
        (
            *("pydoc", "manpages-en", "manpages-fr", "manpages-de"),
            *("libreoffice-help-en", "libreoffice-help-fr", "libreoffice-help-de"),
        )
    )
    steps: int = 70
    pretraining_steps: int = 120
    peak: float = 2e-3

    name = "domain_order"
    title = "Investigating Continual Pretraining (arXiv:2402.17400), on six small domains"
    claims = (
        _claim(
            "random ends better",
            "after all domains, a random order has the lower mean loss",
            RANDOM,
            SIMILAR,
            "retained_loss",
            "random order: better transfer and a better last checkpoint",
        ),
        _claim(
            "random forgets less",
            "a random order forgets less",
            RANDOM,
            SIMILAR,
            "forgetting",
            "random order: reduced forgetting",
        ),
        _claim(
            "random transfers backward",
            "later domains help earlier ones more (or hurt them less) in a random order",
            RANDOM,
            SIMILAR,
            "bwt",
            "random order: positive backward transfer",
        ),
        _claim(
            "random transfers forward",
            "before it is trained, a domain has a lower loss in a random order",
            RANDOM,
            SIMILAR,
            "transfer_loss",
            "random order: better transfer",
        ),
        _claim(
            "similar specialises",
            "right after its stage, a domain has a lower loss in the similar order",
            SIMILAR,
            RANDOM,
            "learned_loss",
            "similar order: models specialise better",
        ),
        _claim(
            "in a row beats alone",
            "right after its stage, a domain has a lower loss than had it been trained alone",
            RANDOM,
            ALONE,
            "learned_loss",
            "continual pretraining improves models under 1.5B and beats domain adaptation",
        ),
        _claim(
            "similar beats alone",
            "the same in the similar order",
            SIMILAR,
            ALONE,
            "learned_loss",
            "continual pretraining improves models under 1.5B and beats domain adaptation",
        ),
    )
    columns = {
        "retained_loss": "retained",
        "learned_loss": "learned",
        "transfer_loss": "before",
        "forgetting": "forgetting",
        "bwt": "BWT",
        "fwt": "FWT",
        "worst_gap": "worst gap",
        "tokens": "tokens",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"tokens of each domain ({self.steps} steps of {self.batch_size} x "
            f"{self.sequence_length} after {self.pretraining_steps} of pretraining), learning "
            "rate, model, first weights of a seed; 'each alone' has seen one domain only"
        )

    @property
    def later(self) -> tuple[str, ...]:
        """The domains after the pretraining, in the order of their names' declaration."""
        return self.domains[1:]

    def adamw_constant(self) -> AdamW:
        """One rate for all places in the order: a stable phase that is never left."""
        warmup = min(self.warmup_steps, self.pretraining_steps // 4)
        schedule = wsd(peak=self.peak, final=self.peak / 10, warmup_steps=warmup)
        return AdamW(schedule=schedule)

    def stages(self, order: Sequence[str]) -> tuple[Stage, ...]:
        """Pretraining, then the domains in this order."""
        first = streams.stage(
            PRETRAINING, {self.domains[0]: 1.0}, **self.sizes(steps=self.pretraining_steps)
        )
        return (first, *streams.stream(order, **self.sizes()))

    def orders(self, seed: int, data: Data) -> dict[str, tuple[str, ...]]:
        """The two orders of a seed; a shuffle that comes out as the similar order is drawn anew."""
        similar = chain_order(similarity(data, self.domains))
        chained = tuple(self.domains[i] for i in similar[1:])
        rng = np.random.Generator(np.random.Philox(key=named_key("domain order", seed, bits=128)))
        shuffled = chained
        while shuffled == chained:
            shuffled = tuple(self.later[i] for i in rng.permutation(len(self.later)))
        return {SIMILAR: chained, RANDOM: shuffled}

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """Two orders, and each domain alone."""
        data = self.data(out)
        orders = self.orders(seed, data) | {f"alone: {name}": (name,) for name in self.later}
        return [
            self.run(
                arm, seed, data, self.stages(order), self.adamw_constant(), domains=self.domains
            )
            for arm, order in orders.items()
        ]

    def derive(self, values: Values, out: pathlib.Path) -> Values:
        """The runs of single domains as one arm: what each has learned alone, on average."""
        del out
        alone: dict[int, dict[str, float]] = {}
        for seed in values[SIMILAR]:
            # The same domains count as in the orders: the pretraining's and the six.
            found = [values[f"alone: {name}"][seed] for name in self.later]
            losses = [
                one[f"learned_loss/{name}"] for one, name in zip(found, self.later, strict=True)
            ]
            losses.append(found[0][f"learned_loss/{self.domains[0]}"])
            alone[seed] = {"learned_loss": float(np.mean(losses))}
        return {ALONE: alone}

    def remarks(self, out: pathlib.Path) -> list[str]:
        """The similarities, and the orders of the seeds."""
        data = self.data(out)
        table = similarity(data, self.domains)
        lines = ["cosine of the domains' mean n-gram vectors (hashed TF-IDF):"]
        for i, name in enumerate(self.domains):
            cells = " ".join(f"{table[i, j]:5.2f}" for j in range(len(self.domains)))
            lines.append(f"  {name:22s} {cells}")
        orders = self.orders(0, data)
        lines += [f"{arm}, seed 0: {', '.join(order)}" for arm, order in orders.items()]
        return [*lines, f"evaluated every {self.interval} steps"]


def similarity(data: Data, domains: Sequence[str]) -> np.ndarray:
    """Cosines of the domains' mean vectors, float64[D, D].

    Args:
      data: the stores; training documents are read, at most 256 of a domain.
      domains: D names.
    """
    means = []
    for domain in domains:
        store = data.open(domain)
        vectors = np.concatenate(list(HashedTfidf(num_tokens=2048).embed(store)))[:256]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        mean = (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float64).mean(axis=0)
        means.append(mean / np.linalg.norm(mean))
    return np.array(means) @ np.array(means).T


def chain_order(similar: Any) -> list[int]:
    """Begins at 0 and goes on to the most similar one that is left; ties to the lowest number.

    >>> chain_order([[1.0, 0.1, 0.5], [0.1, 1.0, 0.2], [0.5, 0.2, 1.0]])
    [0, 2, 1]
    """
    table = np.asarray(similar, np.float64)
    order, left = [0], set(range(1, len(table)))
    while left:
        here = order[-1]
        order.append(min(left, key=lambda other: (-table[here, other], other)))
        left.remove(order[-1])
    return order


PAPER = DomainOrder()
TINY = DomainOrder(
    corpora=MadeUp(("alpha", "beta", "gamma", "delta")),
    steps=3,
    pretraining_steps=4,
    batch_size=3,
    sequence_length=64,
    width=32,
    warmup_steps=1,
    interval=2,
    rows=4,
)
POD = (PodRun("random order", ("configs/papers/pods/domain_order.gin",)),)
