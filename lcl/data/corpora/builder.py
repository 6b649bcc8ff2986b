"""From a corpus to ArrayRecord files: a TFDS builder, so that any TFDS user can read them.

    corpus.read -> drop, deduplicate, split -> ArrayRecord (train, heldout) -> tfds.data_source

TFDS (and with it protobuf, array_record) is imported when something is built or read, not before;
TensorFlow is not imported at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lcl.data.corpora.apt import Package, read_files
from lcl.data.corpora.corpus import CorpusInfo, without_boilerplate
from lcl.data.fingerprints import fingerprint
from lcl.data.sources import (
    HELDOUT,
    TRAIN,
    Document,
    Ledger,
    SourceError,
    first_heldout_group,
    keep_and_split,
)

_READ_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Built:
    """A corpus on the disk.

    Attributes:
        splits: "train" and "heldout" -> a tfds data source (random access; dicts of text, ...).
        ledger: the account of its documents.
        copyrights: package -> its copyright file.
    """

    splits: dict[str, Any]
    ledger: Ledger
    copyrights: dict[str, str]

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, in the files' order (by a hash: a random order)."""
        source = self.splits[split]
        for start in range(0, len(source), _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, len(source))
            for example in source.__getitems__(list(range(start, stop))):
                share = float(example["language_share"])
                yield Document(
                    name=example["name"].decode(),
                    text=example["text"].decode(),
                    source=example["source"].decode(),
                    group=example["group"].decode(),
                    extras={"language_share": share} if share >= 0 else {},
                )


def settings(
    corpus: CorpusInfo, packages: Iterable[Package], *, heldout_fraction: float, seed: int
) -> dict[str, Any]:
    """Everything that decides which documents a corpus has, for fingerprints."""
    import platform

    return {
        "corpus": corpus.name,
        "builder_version": corpus.version,
        "packages": {package.name: package.version for package in packages},
        "python": None if corpus.needs_apt else platform.python_version(),
        "min_characters": corpus.min_characters,
        "heldout_fraction": heldout_fraction,
        "split_seed": seed,
        **corpus.settings,
    }


def build(
    corpus: CorpusInfo,
    packages: list[Package],
    cache_dir: str,
    *,
    heldout_fraction: float,
    seed: int,
    progress: Callable[[Iterable[Document]], Iterable[Document]] = iter,
) -> Built:
    """Builds a corpus under `cache_dir`, or opens what an earlier call built.

    Args:
        corpus: from the registry.
        packages: its downloaded packages.
        cache_dir: folder of built corpora; each combination of settings has its own under it.
        heldout_fraction: share of the documents to hold out.
        seed: of the split.
        progress: wraps the documents as they are read.
    """
    chosen = settings(corpus, packages, heldout_fraction=heldout_fraction, seed=seed)
    folder = os.path.join(cache_dir, corpus.name, fingerprint(chosen)[:16])

    def read() -> tuple[dict[str, list[Document]], Ledger]:
        splits, ledger = _read(corpus, packages, heldout_fraction, seed, progress, None)
        if not splits[TRAIN] or not splits[HELDOUT]:
            group = first_heldout_group(
                splits[TRAIN] + splits[HELDOUT], seed=seed, min_characters=corpus.min_characters
            )
            splits, ledger = _read(corpus, packages, heldout_fraction, seed, progress, group)
        if not splits[TRAIN] or not splits[HELDOUT]:
            raise SourceError(
                f"corpus {corpus.name!r} has too few documents to split ({ledger}); leave it out"
            )
        return splits, ledger

    builder = _builder_class()(corpus, packages, read, data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), _quiet_bars():
        builder.download_and_prepare()
    metadata = dict(builder.info.metadata)
    return Built(
        {name: builder.as_data_source(name) for name in (TRAIN, HELDOUT)},
        Ledger.from_json(metadata["ledger"]),
        metadata["copyrights"],
    )


def _read(
    corpus: CorpusInfo,
    packages: list[Package],
    heldout_fraction: float,
    seed: int,
    progress: Callable[[Iterable[Document]], Iterable[Document]],
    only_heldout: str | None,
) -> tuple[dict[str, list[Document]], Ledger]:
    ledger = Ledger()
    documents: Iterable[Document] = progress(corpus.read(packages, ledger))
    if not corpus.keeps_repeats:
        documents = without_boilerplate(documents, ledger)
    splits: dict[str, list[Document]] = {TRAIN: [], HELDOUT: []}
    for name, document in keep_and_split(
        documents,
        ledger,
        heldout_fraction=heldout_fraction,
        seed=seed,
        min_characters=corpus.min_characters,
        only_heldout=only_heldout,
    ):
        splits[name].append(document)
    ledger.check()
    return splits, ledger


@functools.cache
def _builder_class() -> Any:
    import numpy as np
    import tensorflow_datasets as tfds

    class LclCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg, misc]
        """Documents of one corpus in two splits; see `build`."""

        VERSION = tfds.core.Version("1.0.0")
        # No checksums lie beside this file. (TFDS would look for them with importlib_resources,
        # which it does not install.)
        code_path = None

        def __init__(
            self,
            corpus: CorpusInfo,
            packages: list[Package],
            read: Callable[[], tuple[dict[str, list[Document]], Ledger]],
            **kwargs: Any,
        ):
            self._corpus, self._packages, self._read = corpus, packages, read
            super().__init__(**kwargs)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self._corpus.description}. Licence: {self._corpus.licence}.",
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Scalar(np.int64),
                        "name": tfds.features.Text(),
                        "text": tfds.features.Text(),
                        "source": tfds.features.Text(),
                        "group": tfds.features.Text(),
                        "language_share": tfds.features.Scalar(np.float32),  # -1: not measured.
                    }
                ),
                license=self._corpus.licence,
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            splits, ledger = self._read()
            self.info.metadata["ledger"] = ledger.to_json()
            self.info.metadata["copyrights"] = {
                package.name: _copyright(package) for package in self._packages
            }
            return {name: self._generate_examples(split) for name, split in splits.items()}

        def _generate_examples(self, documents: list[Document]) -> Iterator[tuple[int, Any]]:
            for document in documents:
                yield (
                    document.id,
                    {
                        "id": document.id,
                        "name": document.name,
                        "text": document.text,
                        "source": document.source,
                        "group": document.group or document.name,
                        "language_share": document.extras.get("language_share", -1.0),
                    },
                )

    return LclCorpus


def _copyright(package: Package) -> str:
    prefix = f"./usr/share/doc/{package.name}/copyright"
    for path, data in read_files(package, prefix):
        if path == prefix and data is not None:
            return data.decode("utf-8", errors="replace")
    return ""


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Turns TFDS's own progress bars off for a while: `prepare` shows one of its own."""
    from tensorflow_datasets.core.utils import tqdm_utils

    before = tqdm_utils._active
    tqdm_utils.display_progress_bar(False)
    try:
        yield
    finally:
        tqdm_utils.display_progress_bar(before)
