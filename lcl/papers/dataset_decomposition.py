"""Dataset Decomposition (2405.13226), small: rows of one document and of power-of-two lengths.

    lcl reproduce dataset_decomposition

A two-layer model reads the functions of Python's library, as many tokens a step in every arm:

    concat          |aaaaabbbbbbbbccc|cccddddddddddddd|    one segment: a token sees all before it
    concat, masked  the same rows, a document sees itself only
    best-fit        |aaaaabbbbbbbb...|ccccccdd.|           masked, cut only where longer than a row
    decomposition   |aaaa| |bbbbbbbb| |cc| ...             buckets of 32 .. 512, grow-P2, 8 cycles

Once for equal tokens. And once more for equal seconds: decomposition takes as many steps as cost
the seconds that `concat` needs for its own (how a step's seconds are measured: `lcl.papers.cost`);
the two other arms run the very program of `concat`, on other integers, so for them equal steps are
equal seconds. All are then asked for held-out functions as they are, one a row from its beginning.

The measured result stands in configs/papers/dataset_decomposition.gin.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.data import Data, Mixture, StageData, pack
from lcl.data.curricula import GrowP2
from lcl.data.decomposition import Decomposition, decompose
from lcl.data.fingerprints import fingerprint
from lcl.describe import describe
from lcl.optim import AdamW, cosine
from lcl.papers import code, figures, functions
from lcl.papers.claims import Claim, Values
from lcl.papers.cost import StepCost, mean_seconds, step_costs, steps_within
from lcl.papers.grid import PaperRun, Probe, common_settings, write_json
from lcl.papers.paper import Paper
from lcl.papers.registry import PodRun
from lcl.papers.streams import small_decoder
from lcl.stages import Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONCAT, MASKED, BEST_FIT, DECOMPOSED = "concat", "concat, masked", "best-fit", "decomposition"
ARMS = (CONCAT, MASKED, BEST_FIT, DECOMPOSED)
SECONDS = ", equal seconds"
COSTS_FILE = "step_costs.json"
_PUBLISHED = "410M: average over tasks 2.4 points above concat-and-chunk at equal tokens"
_PUBLISHED_TIME = "more than 6 times faster to equal accuracy (8k context)"
_SOURCE = "2405.13226"


def _claim(name: str, text: str, worse: str, better: str = DECOMPOSED, **more: str) -> Claim:
    return Claim(name, text, better=better, worse=worse, **({"metric": "natural/all"} | more))


@dataclasses.dataclass(frozen=True)
class DatasetDecomposition(Paper):
    """The experiment's sizes; the defaults are minutes on two cores.

    Attributes:
      steps: of every run at equal tokens, and of `concat` at equal seconds.
      batch_size: rows of the longest bucket a step.
      min_log2, max_log2: buckets 2^min .. 2^max; rows elsewhere have 2^max tokens.
      cycles: of the curriculum.
      peak: learning rate of every run.
      num_documents: held-out functions that are scored.
      cost_rounds: rounds in which the seconds of a step are measured.
      limit_modules: only so many modules of the library, for a test.
    """

    steps: int = 120
    batch_size: int = 8
    min_log2: int = 5
    max_log2: int = 9
    cycles: int = 8
    peak: float = 5e-3
    num_documents: int = 384
    cost_rounds: int = 9
    limit_modules: int | None = None

    name = "dataset_decomposition"
    title = "Dataset Decomposition (arXiv:2405.13226), on the functions of Python's library"
    claims = (
        _claim(
            "equal tokens",
            "decomposition learns natural documents better than concat-and-chunk",
            CONCAT,
            published=_PUBLISHED,
            source=_SOURCE,
        ),
        _claim("equal tokens, masked", "better than concat with document masks", MASKED),
        _claim("equal tokens, best-fit", "better than best-fit with document masks", BEST_FIT),
        _claim(
            "equal seconds",
            "in the seconds of concat-and-chunk, decomposition learns more",
            CONCAT,
            DECOMPOSED + SECONDS,
            published=_PUBLISHED_TIME,
            source=_SOURCE,
        ),
        _claim(
            "equal seconds, masked",
            "and more than concat with document masks",
            MASKED,
            DECOMPOSED + SECONDS,
        ),
        _claim(
            "equal seconds, best-fit",
            "and more than best-fit with document masks",
            BEST_FIT,
            DECOMPOSED + SECONDS,
        ),
        _claim("masks", "document masks alone help natural documents", CONCAT, MASKED),
        _claim(
            "beginnings",
            "the gain is at the beginning of documents, which concat seldom sees at a row's start",
            CONCAT,
            metric="natural/0-31",
        ),
    )

    @property
    def columns(self) -> dict[str, str]:
        """The table: the loss of natural documents, whole and by position, and what was trained."""
        marks = functions.position_marks(2**self.max_log2)
        return {
            "natural/all": "all positions",
            **{f"natural/{mark}": mark for mark in marks},
            "tokens": "tokens",
            "steps": "steps",
        }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"cells ({self.steps} steps of {self.batch_size * 2**self.max_log2}; padding of "
            f"best-fit is under 1%), or process-CPU seconds of training steps ({SECONDS[2:]!r}: as "
            f"many steps as cost what {self.steps} steps of {CONCAT!r} do); model, schedule over "
            "the run's own length, first weights of a seed, scored documents"
        )

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """Four runs at equal tokens, and decomposition once more in the seconds of `concat`."""
        data = functions.write(out / "data", self.limit_modules)
        probe = self._probe(data)
        runs = [PaperRun(arm, seed, self.settings(arm, seed, data), probe) for arm in ARMS]
        costs = self.costs(out)
        steps = steps_within(self.steps * mean_seconds(costs[CONCAT]), costs[DECOMPOSED])
        settings = self.settings(DECOMPOSED, seed, data, steps)
        return [*runs, PaperRun(DECOMPOSED + SECONDS, seed, settings, probe)]

    def settings(self, arm: str, seed: int, data: Data, steps: int | None = None) -> dict[str, Any]:
        """Arguments of `train`: the arms differ in how documents become rows, and in nothing else.

        Args:
          arm: one of ARMS.
          seed: of the run.
          data: the stores.
          steps: length of the run; None = that of equal tokens.
        """
        steps = self.steps if steps is None else steps
        length = 2**self.max_log2
        layouts: dict[str, dict[str, Any]] = {
            CONCAT: {"packing": "concat", "document_mask": False},
            MASKED: {"packing": "concat"},
            BEST_FIT: {"packing": "best_fit"},
            DECOMPOSED: {
                "decomposition": Decomposition(
                    self.min_log2,
                    self.max_log2,
                    curriculum=GrowP2(),
                    cycles=self.cycles,
                    tails="drop",
                )
            },
        }
        stage = StageData(
            mixture=Mixture({functions.DOMAIN: 1.0}),
            sequence_length=length,
            batch_size=self.batch_size,
            **layouts[arm],
        )
        schedule = cosine(
            peak=self.peak,
            final=self.peak / 10,
            warmup_steps=min(20, steps // 4),
            total_steps=steps,
        )
        return common_settings(
            model=small_decoder(length), sequence_length=length, batch_size=self.batch_size
        ) | {
            "seed": seed,
            "data": data,
            "stages": (Stage(name="functions", data=stage, steps=steps),),
            "optimizer": AdamW(schedule=schedule),
        }

    # ---- equal seconds -----------------------------------------------------------------------

    def costs(self, out: pathlib.Path) -> dict[str, list[StepCost]]:
        """What a step costs by arm and shape, measured once for a directory and these settings."""
        data = functions.write(out / "data", self.limit_modules)
        settings = {arm: self.settings(arm, 0, data) for arm in ARMS}
        deciding = [describe({k: settings[a][k] for k in ("model", "stages")}) for a in ARMS]
        key = fingerprint(deciding, self.cost_rounds, code.code_hash())
        path = out / COSTS_FILE
        if not path.exists() or json.loads(path.read_text())["key"] != key:
            measured = step_costs(settings, rounds=self.cost_rounds)
            write_json(path, {"key": key, "costs": measured})
        table = json.loads(path.read_text())["costs"]
        return {
            arm: [StepCost((shape[0], shape[1]), seconds, steps) for shape, seconds, steps in rows]
            for arm, rows in table.items()
        }

    # ---- the report --------------------------------------------------------------------------

    def remarks(self, out: pathlib.Path) -> list[str]:
        """What a step costs, the mean context of a token, and what is left out or padded."""
        costs = self.costs(out)
        data = functions.write(out / "data", self.limit_modules)
        lengths = data.open(functions.DOMAIN).lengths - 1
        length = 2**self.max_log2
        parts = decompose(
            lengths, min_log2=self.min_log2, max_log2=self.max_log2, seed=0, tails="drop"
        )
        fill = pack(lengths, length).fill
        means = {arm: mean_seconds(costs[arm]) for arm in ARMS}
        relative = ", ".join(
            f"{arm} {1000 * s:.1f} ms ({s / means[CONCAT]:.2f})" for arm, s in means.items()
        )
        by_shape = ", ".join(
            f"{c.shape[0]} x {c.shape[1]}: {1000 * c.seconds:.1f} ms" for c in costs[DECOMPOSED]
        )
        return [
            f"process-CPU seconds of a step (and over concat's): {relative}",
            f"of decomposition by bucket: {by_shape}",
            f"keys a token sees on average: concat {(length + 1) / 2:.0f}, decomposition "
            f"{parts.mean_context:.0f}",
            f"decomposition drops tails shorter than {2**self.min_log2}: "
            f"{parts.dropped_tokens / parts.num_transitions:.1%} of the tokens; best-fit fills "
            f"{fill:.2%} of its cells",
            f"{len(lengths):,} training documents of {int(np.median(lengths))} tokens at the "
            f"median, {int(lengths.sum()):,} tokens together",
        ]

    def draw(self, values: Values) -> Figure:
        """The loss of natural documents, whole, at their beginnings and far into them."""
        marks = functions.position_marks(2**self.max_log2)
        panels = [("natural/all", "natural documents")]
        panels += [(f"natural/{mark}", f"positions {mark}") for mark in (marks[0], marks[-1])]
        return figures.bars(panels, values)

    def _probe(self, data: Data) -> Probe:
        settings: dict[str, Any] = {
            "num_documents": self.num_documents,
            "sequence_length": 2**self.max_log2,
            "batch_size": self.batch_size * 2,
        }
        heldout = data.open(functions.DOMAIN, "heldout")
        return Probe(
            {"natural": functions.natural_batches(heldout, **settings)},
            functions.position_marks(2**self.max_log2),
            version=1,
            settings=settings,
        )


PAPER = DatasetDecomposition()
TINY = DatasetDecomposition(
    steps=4,
    batch_size=2,
    max_log2=6,
    cycles=1,
    num_documents=6,
    cost_rounds=1,
    limit_modules=40,
)
POD = (
    PodRun("decomposition", ("configs/papers/pods/dataset_decomposition.gin",)),
    PodRun(
        "concat",
        (
            "configs/papers/pods/dataset_decomposition.gin",
            "configs/papers/pods/dataset_decomposition_concat.gin",
        ),
    ),
)
