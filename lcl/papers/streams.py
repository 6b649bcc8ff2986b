"""The streams that papers are tried on: domains one after the other, small models, one interval.

    Prepared(("manpages-en", "manpages-fr", "manpages-de"))   real text, by `lcl prepare`
    MadeUp(("alpha", "beta"))                                 made-up languages, for tests

    stream(("a", "b", "c"), steps=150)    |aaaaaaaa|bbbbbbbb|cccccccc|      one stage a domain
    joint(("a", "b", "c"), steps=450)     |abcacbbacabcbacbacbabcacbc|      all of it at once

What several papers share stands here once, so that their tables can be read beside one another.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lcl.data import Data, Mixture, Replay, StageData
from lcl.evals import Branches, HeldOut
from lcl.models import DecoderConfig
from lcl.models.rope import Rope
from lcl.papers import code
from lcl.papers.grid import common_settings
from lcl.stages import Stage


class Corpora(Protocol):
    """Domains that can be written as stores: `names` in the order of the stream."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def write(self, root: str | os.PathLike[str]) -> Data:
        """Makes the stores that are not there yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Real corpora, by their names in `lcl prepare --list`, as bytes.

    Attributes:
      names: of the corpora.
      limit_documents: only so many a corpus; None = all.
      heldout_fraction: share of the documents that is kept from training.
    """

    names: tuple[str, ...]
    limit_documents: int | None = None
    heldout_fraction: float = 0.05

    def write(self, root: str | os.PathLike[str]) -> Data:
        """Builds the stores; a ValueError of one line where a corpus cannot be had here."""
        from lcl.data.prepare import prepare

        prepare(
            self.names,
            root=root,
            limit_documents=self.limit_documents,
            heldout_fraction=self.heldout_fraction,
            log=lambda line: None,
        )
        return Data(os.fspath(root))


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """Made-up languages (`lcl.data.testing`): milliseconds, and no network.

    Attributes:
      names: of the languages; a name is a lexicon.
      documents: of each, held-out ones included.
    """

    names: tuple[str, ...]
    documents: int = 60

    def write(self, root: str | os.PathLike[str]) -> Data:
        """Writes the stores, unless they are there."""
        from lcl.data import testing

        made = code.file_hash(pathlib.Path(testing.__file__))[:8]
        root = os.path.join(root, f"{self.documents}-{made}")
        if all(os.path.exists(os.path.join(root, name, "heldout")) for name in self.names):
            return Data(root)
        return testing.make_stores(root, dict.fromkeys(self.names, self.documents), seed=3)


def small_decoder(context_length: int, width: int = 64) -> DecoderConfig:
    """Two layers over bytes: what two cores train in seconds.

    Args:
      context_length: T.
      width: D; the MLP is three times as wide, and there are four heads.
    """
    return DecoderConfig(
        vocab_size=384,
        num_layers=2,
        embed_dim=width,
        mlp_dim=3 * width,
        num_heads=4,
        context_length=context_length,
        rope=Rope(theta=1e4),
        qk_norm=True,
    )


def stage(
    name: str,
    weights: Mapping[str, float] | Any,
    *,
    steps: int,
    batch_size: int,
    sequence_length: int,
    replay: Replay | None = None,
    **policy: Any,
) -> Stage:
    """A stage over weights by domain, or any mixture of `lcl.data`; `policy`: of `Stage`."""
    mixture = Mixture(dict(weights)) if isinstance(weights, Mapping) else weights
    data = StageData(
        mixture=mixture, sequence_length=sequence_length, batch_size=batch_size, replay=replay
    )
    return Stage(name=name, data=data, steps=steps, **policy)


def stream(names: Sequence[str], **arguments: Any) -> tuple[Stage, ...]:
    """One stage a domain, named like it; `arguments`: of `stage`, the same for all."""
    return tuple(stage(name, {name: 1.0}, **arguments) for name in names)


def joint(names: Sequence[str], **arguments: Any) -> tuple[Stage, ...]:
    """All domains at once, in equal shares, in one stage: what a stream is measured against."""
    return (stage("joint", dict.fromkeys(names, 1.0), **arguments),)


def settings(
    *,
    seed: int,
    data: Data,
    model: DecoderConfig,
    stages: Sequence[Stage],
    optimizer: Any,
    interval: int | None,
    rows: int,
    domains: Sequence[str] | None = None,
    branches: Branches | None = None,
    diagnostics: Sequence[Any] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of `train` for a run over a stream.

    Args:
      seed, data, model, stages, optimizer: of `train`.
      interval: steps between evaluations within stages; None = at the stages' ends only.
      rows: held-out rows a domain.
      domains: which are evaluated; None = the run's.
      branches: annealed copies to evaluate too.
      diagnostics: what to look at beside the loss (`lcl.analysis`).
      **changes: other arguments of `train`.
    """
    first = stages[0].data
    shared = common_settings(
        model=model, sequence_length=first.sequence_length, batch_size=first.batch_size
    )
    evaluation = HeldOut(
        every_steps=interval,
        rows_per_domain=rows,
        sequence_length=first.sequence_length,
        batch_size=min(rows, 32),
        domains=None if domains is None else tuple(domains),
        branches=branches,
    )
    own = {"seed": seed, "data": data, "stages": tuple(stages), "optimizer": optimizer}
    own["logging"] = dataclasses.replace(shared["logging"], diagnostics=tuple(diagnostics))
    return shared | own | {"evaluation": evaluation} | changes
