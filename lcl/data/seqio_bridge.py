"""SeqIO tasks as documents, and SeqIO vocabularies as tokenizers: a T5X user's work goes on here.

    lcl prepare --module my.tasks --seqio c4=c4_task --tokenizer seqio:task=c4_task

    task's example  {"inputs_pretokenized": ..., "targets_pretokenized": ..., "targets": [ids]}
    document's text  inputs_pretokenized + newline + targets_pretokenized

A feature's text is its `*_pretokenized` twin, which `seqio.preprocessors.tokenize` leaves there;
without one, its ids are decoded by the task's vocabulary (only as lossless as that is). A store
made with `seqio:task=...` then holds the task's own ids. SeqIO, and with it TensorFlow (seconds),
is imported when a task is read; a store's `seqio:` tokenizer needs neither afterwards.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lcl.data.fingerprints import fingerprint
from lcl.data.readers import Meter
from lcl.data.sources import Document, Ledger, SourceError
from lcl.data.tokenizers import TokenizerError, read_file

_SPACE_SYMBOL = "\u2581"


# ---- tasks


def _task(name: str) -> Any:
    import seqio

    if name in seqio.MixtureRegistry.names():
        raise SourceError(
            f"{name!r} is a SeqIO mixture; prepare its tasks as domains and mix them when training "
            "(StageData.mixture)"
        )
    try:
        return seqio.TaskRegistry.get(name)
    except ValueError as error:
        near = difflib.get_close_matches(name, seqio.TaskRegistry.names(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SourceError(
            f"no SeqIO task {name!r} is registered{hint}; name the module that registers it "
            "(--module)"
        ) from error


def task_inputs(name: str, split: str) -> list[Any]:
    """What is known of a task's data without reading it: enough to see many changes, not all.

    Raises:
        SourceError: no such task or split.
    """
    import seqio

    task = _task(name)
    if split not in task.splits:
        known = ", ".join(sorted(task.splits)) or "none"
        raise SourceError(f"SeqIO task {name!r} has no split {split!r}; it has {known}")
    return [seqio.__version__, name, split, task.num_input_examples(split)]


def task_documents(
    name: str, ledger: Ledger, *, split: str = "train", meter: Meter | None = None
) -> Iterator[Document]:
    """The examples of a registered task as documents, in the source's own order (never shuffled).

    Args:
        name: of the task.
        ledger: gets examples without text.
        split: of the task.
        meter: told how far reading is.

    Raises:
        SourceError: no such task or split, or an example that has none of the task's features.
    """
    task = _task(name)
    task_inputs(name, split)
    features: dict[str, Any] = task.output_features
    if meter is not None:
        meter.total, meter.unit = task.num_input_examples(split), " documents"
    # Sequence lengths: none, so that nothing is trimmed.
    dataset = task.get_dataset(None, split=split, shuffle=False, num_epochs=1)
    for number, example in enumerate(dataset.as_numpy_iterator()):
        if meter is not None:
            meter.done = number + 1
        if not any(key in example or f"{key}_pretokenized" in example for key in features):
            raise SourceError(
                f"an example of SeqIO task {name!r} has none of its features "
                f"({', '.join(features)}); it has {', '.join(example)}"
            )
        try:
            texts = [_feature_text(example, key, one) for key, one in features.items()]
        except UnicodeDecodeError:
            ledger.drop("not UTF-8")
            continue
        text = "\n".join(text for text in texts if text)
        yield Document(name=f"{split}:{number}", text=text, source=name)


def _feature_text(example: dict[str, Any], key: str, feature: Any) -> str:
    value = example.get(f"{key}_pretokenized", example.get(key))
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    value = np.asarray(value)
    if value.dtype.kind in "OS":
        return " ".join(one.decode("utf-8") for one in value.ravel().tolist())
    ids = value.ravel().astype(int).tolist()
    eos = feature.vocabulary.eos_id
    if ids and eos is not None and ids[-1] == eos:
        ids.pop()
    return feature.vocabulary.decode(ids)


# ---- vocabularies


class SeqioTokenizer:
    """The ids of a `seqio.SentencePieceVocabulary`, by SentencePiece alone.

    `seqio:PATH.model[,extra_ids=N][,reverse_extra_ids=0]`: the ids of the model, then N sentinels.
    Most such models normalise text and have no bytes to fall back to, so `decode(encode(text))` may
    differ from the text, and bits per byte count the bytes of the normalised pieces. A model
    without bos (T5's) opens documents with its pad id, as T5's decoder does.
    """

    def __init__(self, path: str, *, extra_ids: int = 0, model: bytes | None = None):
        """Loads `path`, or takes the bytes of a `model` that will lie there."""
        import sentencepiece

        if extra_ids < 0:
            raise TokenizerError(f"extra_ids={extra_ids} must not be negative")
        self.model = read_file(path, "SentencePiece model") if model is None else model
        self.extra_ids = extra_ids
        self.spec = f"seqio:{path},extra_ids={extra_ids}"
        self.fingerprint = fingerprint("seqio", self.model, extra_ids)
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{path!r} is no SentencePiece model; give the .model file itself"
            ) from error
        self._processor = processor
        self.num_pieces = int(processor.vocab_size())
        self.vocab_size = self.num_pieces + extra_ids
        bos, pad = int(processor.bos_id()), int(processor.pad_id())
        self.bos_id, self.eos_id = (bos if bos >= 0 else pad), int(processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(
                f"SentencePiece model {path!r} has no eos, or neither bos nor pad; documents need "
                "borders"
            )
        self.can_chunk = not processor.encode("x", out_type=str)[0].startswith(_SPACE_SYMBOL)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return np.asarray(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [one for one in np.asarray(ids).astype(int).tolist() if one < self.num_pieces]
        return self._processor.decode(known)

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        processor = self._processor
        for i in range(self.num_pieces):
            if processor.is_byte(i):
                sizes[i] = 1
            elif not (processor.is_control(i) or processor.is_unknown(i)):
                piece = processor.id_to_piece(i).replace(_SPACE_SYMBOL, " ")
                sizes[i] = len(piece.encode("utf-8"))
        return sizes


def parse_seqio(rest: str, base: str | None = None) -> SeqioTokenizer:
    """The tokenizer of `seqio:REST`: "PATH.model[,extra_ids=N]", or "task=NAME" (loads SeqIO).

    Raises:
        TokenizerError: an unknown option, a missing file, or a vocabulary of another kind.
    """
    import os

    if rest.startswith("task="):
        name = rest.removeprefix("task=")
        features = _task(name).output_features
        feature = features["targets"] if "targets" in features else next(iter(features.values()))
        return vocabulary_tokenizer(feature.vocabulary)
    path, *options = rest.split(",")
    extra_ids = 0
    for option in options:
        name, _, value = option.partition("=")
        if name != "extra_ids" or not value.isdecimal():
            raise TokenizerError(f"unknown option {option!r} in 'seqio:{rest}'; use extra_ids=N")
        extra_ids = int(value)
    return SeqioTokenizer(os.path.join(base, path) if base else path, extra_ids=extra_ids)


def vocabulary_tokenizer(vocabulary: Any) -> SeqioTokenizer:
    """A `seqio.SentencePieceVocabulary` as a tokenizer with the same ids.

    Raises:
        TokenizerError: another kind of vocabulary, or sentinels in another order.
    """
    import seqio

    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        raise TokenizerError(
            f"a {type(vocabulary).__name__} cannot be used as a tokenizer, a "
            "SentencePieceVocabulary can; use byte, sentencepiece:PATH or hf:PATH"
        )
    # SeqIO appends its sentinels to the model as pieces; the file itself has the others.
    model = read_file(vocabulary.sentencepiece_model_file, "SentencePiece model")
    return SeqioTokenizer(
        vocabulary.sentencepiece_model_file, extra_ids=vocabulary.extra_ids, model=model
    )


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that register SeqIO tasks or TFDS builders, from here or installed.

    Raises:
        ValueError: one that cannot be imported.
    """
    sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--module {name!r} cannot be imported ({error})") from error
