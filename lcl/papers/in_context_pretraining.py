"""In-Context Pretraining (2310.10638), small: does an order of related documents teach their use?

    lcl reproduce in_context_pretraining

A two-layer model reads a topical corpus (`lcl.papers.topics`) in three orders, whose rows have no
document mask: a random one, kNN (every document followed by its neighbours, with repeats)
and the paper's path through the document graph. Then it is asked for facts that were drawn after
the training corpus, behind documents of the same topic and behind documents of other topics:

    trained in order     random | kNN | in-context          each without duplicates, or with 20%
    asked in             related contexts | random contexts
    scored               recall: a value its document has not yet stated and a related context has
                         repeat: a value it has stated     all: every token of the document

The measured result stands in configs/papers/in_context_pretraining.gin.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.data import Data, Mixture, StageData
from lcl.data.embeddings import HashedTfidf
from lcl.data.in_context import InContext, KNNOrder
from lcl.optim import AdamW, cosine
from lcl.papers import figures
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun, Probe, common_settings
from lcl.papers.paper import Paper
from lcl.papers.registry import PodRun
from lcl.papers.streams import small_decoder
from lcl.papers.topics import DOMAIN, TARGET_KINDS, VALUES, TopicalCorpus, contexts
from lcl.stages import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM, KNN, IN_CONTEXT = "random", "kNN", "in-context"
RANDOM_DUPLICATES, KEPT, PRUNED = (
    "random, duplicates",
    "in-context, duplicates kept",
    "in-context, duplicates pruned",
)
# Two bytes are a fact, four the topic's name: what two documents of a topic share.
EMBEDDER = HashedTfidf(ngrams=(2, 4))


@dataclasses.dataclass(frozen=True)
class InContextPretraining(Paper):
    """The experiment's sizes; the defaults are minutes on two cores.

    Attributes:
      corpus: of every seed, its own seed aside.
      duplicates: share of near-duplicates in the arms that have some.
      duplicate_threshold: cosine from which the pruning arm takes a document for one. Looked at
        once: nearly all near-duplicate pairs lie above it, 99% of a topic's other pairs below 0.48.
      steps, batch_size, sequence_length: of every run.
      peak: learning rate of every run.
      num_rows: scored documents for each kind of context.
      num_before: documents before the scored one.
    """

    corpus: TopicalCorpus = TopicalCorpus()
    duplicates: float = 0.2
    duplicate_threshold: float = 0.55
    num_neighbors: int = 10
    steps: int = 360
    batch_size: int = 8
    sequence_length: int = 256
    peak: float = 1e-2
    num_rows: int = 256
    num_before: int = 4

    name = "in_context_pretraining"
    title = "In-Context Pretraining (arXiv:2310.10638), on a topical corpus"
    claims = (
        Claim(
            "recall in related contexts",
            "in-context order teaches to read facts from earlier documents, random order less",
            better=IN_CONTEXT,
            worse=RANDOM,
            metric="related/recall",
            published="7B, ICP against standard: HotpotQA 21.9 / 10.5, NQ-Swap 45.8 / 39.6",
            source="2310.10638",
        ),
        Claim(
            "loss in related contexts",
            "in-context order lowers the loss of the last document of a related context",
            better=IN_CONTEXT,
            worse=RANDOM,
            metric="related/all",
            published="perplexity lower at all sizes; ablation: random 8.2, ICP 7.3",
            source="2310.10638, Figure 5",
        ),
        Claim(
            "against kNN",
            "in-context order recalls better than kNN order, which repeats documents",
            better=IN_CONTEXT,
            worse=KNN,
            metric="related/recall",
            published="7B, reading comprehension on average: ICP 43.2, kNN 36.0, standard 37.6",
            source="2310.10638",
        ),
        Claim(
            "loss in random contexts",
            "in-context order also lowers the loss where the context is not related",
            better=IN_CONTEXT,
            worse=RANDOM,
            metric="random/all",
            published="closed book slightly worse: TQA 48.0 / 49.3",
            source="2310.10638",
        ),
        Claim(
            "duplicates hurt",
            "20% near-duplicates in the path cost recall in related contexts",
            better=IN_CONTEXT,
            worse=KEPT,
            metric="related/recall",
            published="ablation: perplexity 8.3 without deduplication, 7.3 with",
            source="2310.10638, Figure 5",
        ),
        Claim(
            "pruning helps",
            "pruning near-duplicates before the graph recalls better than keeping them",
            better=PRUNED,
            worse=KEPT,
            metric="related/recall",
            published="ablation: perplexity 8.3 without deduplication, 7.3 with",
            source="2310.10638, Figure 5",
        ),
        Claim(
            "recall despite duplicates",
            "with 20% near-duplicates, pruned, in-context order still recalls better than random",
            better=PRUNED,
            worse=RANDOM_DUPLICATES,
            metric="related/recall",
        ),
    )
    columns = {
        "related/recall": "related: recall",
        "related/repeat": "related: repeat",
        "related/all": "related: all",
        "random/recall": "random: recall",
        "random/repeat": "random: repeat",
        "random/all": "random: all",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"tokens ({self.steps} steps of {self.batch_size} x {self.sequence_length}), "
            "model, schedule, first weights of a seed, scored documents; rows without document mask"
        )

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """The six runs of a seed, over two corpora that differ in their near-duplicates."""
        corpora, stores = {}, {}
        for share in (0.0, self.duplicates):
            corpus = dataclasses.replace(self.corpus, duplicates=share, seed=seed)
            corpora[share] = corpus
            stores[share] = corpus.write(out / "data" / f"seed{seed}-duplicates{share:g}")
        # Names, facts and held-out documents do not hang on the duplicates: one probe for all.
        probe = self._probe(corpora[0.0], stores[0.0])
        plain, pruned = (
            self._order(InContext, None),
            self._order(InContext, self.duplicate_threshold),
        )
        arms: list[tuple[str, float, Any]] = [
            (RANDOM, 0.0, "shuffle"),
            (KNN, 0.0, self._order(KNNOrder, None)),
            (IN_CONTEXT, 0.0, plain),
            (RANDOM_DUPLICATES, self.duplicates, "shuffle"),
            (KEPT, self.duplicates, plain),
            (PRUNED, self.duplicates, pruned),
        ]
        return [
            PaperRun(arm, seed, self.settings(seed, stores[share], order), probe)
            for arm, share, order in arms
        ]

    def settings(self, seed: int, data: Data, order: Any) -> dict[str, Any]:
        """Arguments of `train` of one arm: the arms differ in `order` (and in the store)."""
        stage = StageData(
            mixture=Mixture({DOMAIN: 1.0}),
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            packing="concat",
            document_mask=False,
            order=order,
        )
        schedule = cosine(
            peak=self.peak,
            final=self.peak / 10,
            warmup_steps=min(20, self.steps // 4),
            total_steps=self.steps,
        )
        return common_settings(
            model=small_decoder(self.sequence_length),
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
        ) | {
            "seed": seed,
            "data": data,
            "stages": (Stage(name="topics", data=stage, steps=self.steps),),
            "optimizer": AdamW(schedule=schedule),
        }

    def remarks(self, out: pathlib.Path) -> list[str]:
        """The corpus, and what the orders of seed 0 look like."""
        lines = []
        for label, share, order in (
            ("in-context order", 0.0, self._order(InContext, None)),
            ("kNN order", 0.0, self._order(KNNOrder, None)),
            ("with duplicates, kept", self.duplicates, self._order(InContext, None)),
            (
                "with duplicates, pruned",
                self.duplicates,
                self._order(InContext, self.duplicate_threshold),
            ),
        ):
            data = Data(str(out / "data" / f"seed0-duplicates{share:g}"))
            store = data.open(DOMAIN)
            plan = order.plan(store, seed=0, domain=DOMAIN, cache_dir=out / "data" / "orders")
            topic = np.asarray(store.extra("topic"))[plan.order]
            figures = plan.report()
            lines.append(
                f"{label}: {figures['places']:,} places of {figures['documents']:,} documents, "
                f"{figures['jumps']:,} jumps, adjacent cosine {figures['mean_similarity']:.3f}, "
                f"next document of the same topic {np.mean(topic[1:] == topic[:-1]):.1%}, "
                f"{figures['near_duplicates']:,} near-duplicates found"
            )
        return lines

    def draw(self, values: Values) -> Figure:
        """Recall in both contexts and the whole loss in both; dashed: log 16, knowing nothing."""
        return figures.bars(
            [("related/recall", "recall, related contexts"), ("random/recall", "recall, random")],
            values,
            reference=math.log(len(VALUES)),
        )

    def _order(self, kind: type[InContext] | type[KNNOrder], threshold: float | None) -> Any:
        return kind(
            embedder=EMBEDDER,
            num_neighbors=self.num_neighbors,
            duplicate_threshold=threshold,
            duplicates="drop",
        )

    def _probe(self, corpus: TopicalCorpus, data: Data) -> Probe:
        heldout = data.open(DOMAIN, "heldout")
        settings: dict[str, Any] = {
            "num_rows": self.num_rows,
            "num_before": self.num_before,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size * 4,
        }
        batches: Mapping[str, Sequence[Any]] = {
            name: contexts(corpus, heldout, related=name == "related", **settings)
            for name in ("related", "random")
        }
        return Probe(batches, TARGET_KINDS, version=1, settings=settings)


PAPER = InContextPretraining()
TINY = InContextPretraining(
    corpus=TopicalCorpus(num_topics=24, documents_per_topic=5, min_facts=8, max_facts=9),
    duplicates=0.4,
    num_neighbors=3,
    steps=3,
    batch_size=2,
    sequence_length=128,
    num_rows=4,
    num_before=3,
)
POD = (
    PodRun("in-context", ("configs/papers/pods/in_context_pretraining.gin",)),
    PodRun(
        "random",
        ("configs/papers/pods/in_context_pretraining.gin",),
        ("StageData.order='shuffle'",),
    ),
)
