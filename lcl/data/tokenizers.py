"""Tokenizers: text to integers and back, byte for byte.

Four kinds, each named by a one-line spec:

    byte                            256 bytes + bos + eos; needs no file
    sentencepiece:PATH.model        a SentencePiece model (`train_sentencepiece` makes one)
    hf:PATH/tokenizer.json          a byte-level BPE of Hugging Face `tokenizers`
    hf:PATH/tokenizer.json,bos=<s>,eos=</s>      the same, its borders named by hand
    seqio:PATH.model,extra_ids=100  the ids of a SeqIO vocabulary; see `lcl.data.seqio_bridge`

All but the last are lossless, `decode(encode(text)) == text`, and all say for how many UTF-8 bytes
each token stands (`token_num_bytes`). That table turns nats per token into bits per byte, the unit
in which models with different tokenizers can be compared.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lcl.data.fingerprints import fingerprint

SPEC_FORMS = (
    "byte | sentencepiece:PATH.model | hf:PATH/tokenizer.json | seqio:PATH.model,extra_ids=N"
)

# Borders by name, for a tokenizer.json that has no tokenizer_config.json beside it; best first.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")

# SentencePiece writes a space as this character, so a real one in the text needs care.
_SPACE_SYMBOL = "\u2581"
# A text that a lossless tokenizer gives back: runs of blanks, tabs, newlines, accents, emoji.
_PROBE = "  Hé\tllo\n\n  wörld, \r\n日本語 \U0001f600\u0301 x  y\n"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message is one line and says the mend."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the house may ask of a tokenizer.

    Attributes:
        spec: the one-line name that `load_tokenizer` takes.
        vocab_size: number of ids, specials included; every id is below it.
        bos_id: the id that opens a stored document.
        eos_id: the id that closes a stored document (may equal bos_id, as in GPT-2).
        fingerprint: a hash of the tokenizer's content; where its file lies does not matter.
        can_chunk: whether encode(a + b) may be replaced by encode(a), encode(b) without
            inventing characters (false where the tokenizer opens a text with a space of its own).
    """

    spec: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    can_chunk: bool

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of `text`, int32[num_tokens], without bos and eos."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`[encode(text) for text in texts]`, faster where the library can."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; specials stand for nothing."""
        ...

    @property
    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32[vocab_size]; specials have 0."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then bos = 256 and eos = 257.

    >>> ByteTokenizer().encode("hé").tolist()
    [104, 195, 169]
    >>> ByteTokenizer().decode([256, 104, 195, 169, 257])
    'hé'
    """

    spec = "byte"
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    can_chunk = True
    fingerprint = fingerprint("byte", 258, 256, 257)

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # uint8 views of the bytes: whoever writes them widens them once.
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


class SentencePieceTokenizer:
    """A SentencePiece model, used so that it loses nothing.

    A model is accepted only if it gives a probing text back unchanged: byte fallback, identity
    normalisation, no removal of extra blanks. U+2581, by which SentencePiece writes a space, would
    come back as a space; it is encoded as its three bytes instead.
    """

    def __init__(self, path: str, *, model: bytes | None = None):
        """Loads `path`, or takes the bytes of a `model` that will lie there."""
        import sentencepiece

        self.spec = f"sentencepiece:{path}"
        model = read_file(path, "SentencePiece model") if model is None else model
        self.model = model
        self.fingerprint = fingerprint("sentencepiece", model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{path!r} is no SentencePiece model; give the .model file itself"
            ) from error
        processor = self._processor
        self.vocab_size = int(processor.vocab_size())
        self.bos_id, self.eos_id = int(processor.bos_id()), int(processor.eos_id())
        for name, token_id in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token_id < 0:
                raise TokenizerError(
                    f"SentencePiece model {path!r} has no {name} token; "
                    f"train it with {name}_id >= 0, or with `lcl prepare`"
                )
        byte_pieces = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._space_symbol_ids = [byte_pieces[byte] for byte in _SPACE_SYMBOL.encode()]
        lossless = (
            all(map(processor.is_byte, byte_pieces)) and self.decode(self.encode(_PROBE)) == _PROBE
        )
        if not lossless:
            raise TokenizerError(
                f"SentencePiece model {path!r} does not give text back unchanged; train one with "
                "byte_fallback, normalization_rule_name=identity and remove_extra_whitespaces off "
                "(`lcl prepare` does)"
            )
        first = processor.encode("x", out_type=str)[0]
        self.can_chunk = not first.startswith(_SPACE_SYMBOL)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        if _SPACE_SYMBOL not in text:
            return np.asarray(self._processor.encode(text), dtype=np.int32)
        ids: list[int] = []
        for i, piece in enumerate(text.split(_SPACE_SYMBOL)):
            ids += (self._space_symbol_ids if i else []) + self._processor.encode(piece)
        return np.asarray(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(_SPACE_SYMBOL in text for text in texts):
            return [self.encode(text) for text in texts]
        rows = self._processor.encode(list(texts), num_threads=1)
        return [np.asarray(ids, dtype=np.int32) for ids in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode(np.asarray(ids).astype(int).tolist())

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                sizes[i] = 1
            elif not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                piece = self._processor.id_to_piece(i).replace(_SPACE_SYMBOL, " ")
                sizes[i] = len(piece.encode("utf-8"))
        return sizes


class HuggingFaceTokenizer:
    """A byte-level BPE read from a Hugging Face `tokenizer.json`.

    bos and eos are, in this order: those given, those that a tokenizer_config.json beside the file
    names, the usual names. Text that spells a special token is text: it is not turned into one.
    """

    def __init__(self, path: str, *, bos: str | None = None, eos: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise TokenizerError(
                "a hf: tokenizer needs the package tokenizers: pip install 'lcl[hf]'"
            ) from error

        self.data = data = read_file(path, "tokenizer.json")
        try:
            description = json.loads(data)
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # The library raises bare Exception.
            raise TokenizerError(
                f"{path!r} is no Hugging Face tokenizer.json ({_one_line(error)})"
            ) from error
        if "ByteLevel" not in _component_types(description.get("decoder")):
            raise TokenizerError(
                f"tokenizer {path!r} is not byte-level, so the bytes of its tokens are unknown; "
                "use a byte-level BPE (Llama 3, Qwen, GPT-2, SmolLM), sentencepiece:... or byte"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added = {int(t["id"]): t for t in description.get("added_tokens") or []}
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        neighbour = _read_json(os.path.join(os.path.dirname(path), "tokenizer_config.json"))
        self.bos = self._border("bos", bos, neighbour.get("bos_token"), _BOS_NAMES, path)
        self.eos = self._border("eos", eos, neighbour.get("eos_token"), _EOS_NAMES, path)
        self.bos_id, self.eos_id = self._vocabulary[self.bos], self._vocabulary[self.eos]
        self.spec = f"hf:{path},bos={self.bos},eos={self.eos}"
        self.fingerprint = fingerprint("hf", data, self.bos_id, self.eos_id)
        self.can_chunk = (
            not self._tokenizer.encode("x", add_special_tokens=False).tokens[0].startswith("Ġ")
        )

    def _border(
        self, kind: str, given: str | None, configured: Any, names: Sequence[str], path: str
    ) -> str:
        if isinstance(configured, dict):  # An AddedToken written out.
            configured = configured.get("content")
        wanted = [given] if given else [configured, *names]
        for name in wanted:
            if name is not None and name in self._vocabulary:
                return name
        tried = given or ", ".join(str(name) for name in wanted if name)
        raise TokenizerError(
            f"tokenizer {path!r} has no {kind} token (tried {tried}); "
            f"name one of its tokens: hf:{path},{kind}=TOKEN"
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return np.asarray(
            self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(row.ids, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).astype(int).tolist())

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._vocabulary.items():
            added = self._added.get(i)
            if i in (self.bos_id, self.eos_id) or (added and added["special"]):
                continue
            # A byte-level token writes each byte as one printable character (GPT-2's table).
            sizes[i] = len(token.encode("utf-8")) if added else len(token)
        return sizes


def load_tokenizer(spec: str, *, base: str | None = None) -> Tokenizer:
    """Returns the tokenizer that `spec` names.

    Args:
        spec: "byte", "sentencepiece:PATH.model", "hf:PATH/tokenizer.json[,bos=X][,eos=Y]" or
            "seqio:PATH.model[,extra_ids=N]".
        base: the folder from which a relative PATH is counted; default: the current one.

    Raises:
        TokenizerError: unknown kind, missing or unfit file; one line with the mend.

    >>> load_tokenizer("byte").vocab_size
    258
    """
    kind, _, rest = spec.partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if kind == "seqio" and rest:
        from lcl.data.seqio_bridge import parse_seqio

        return parse_seqio(rest, base)
    path, *options = rest.split(",") if kind == "hf" else [rest]
    if kind not in ("sentencepiece", "hf") or not path:
        raise TokenizerError(f"unknown tokenizer {spec!r}; use {SPEC_FORMS}")
    if base is not None:
        path = os.path.join(base, path)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path)
    borders = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in ("bos", "eos") or not equals or not value:
            raise TokenizerError(f"unknown option {option!r} in {spec!r}; use bos=TOKEN, eos=TOKEN")
        borders[name] = value
    return HuggingFaceTokenizer(path, **borders)


def train_sentencepiece(
    texts: Iterable[str],
    path: str,
    vocab_size: int,
    *,
    max_bytes: int = 32_000_000,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Trains a lossless SentencePiece BPE on `texts` and publishes it at `path` in one step.

    Integers only (BPE counts), and the text is taken in the order given: the same texts give the
    same model. Characters too rare for the vocabulary fall back to bytes.

    Args:
        texts: documents; at most the first `max_bytes` bytes of them are used.
        path: where the .model file goes.
        vocab_size: number of ids, of which 259 are unk, bos, eos and the 256 bytes.
        max_bytes: bound on memory and time.
        character_coverage: share of characters that get a token of their own.

    Raises:
        TokenizerError: a vocabulary that is too small, or larger than the text can fill.
    """
    import sentencepiece

    if vocab_size < 300:
        raise TokenizerError(
            f"a SentencePiece vocabulary of {vocab_size} is too small: 259 ids are bytes and "
            "specials; use at least 300, or the tokenizer byte"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"no SentencePiece vocabulary of {vocab_size} could be trained "
            f"({_one_line(error)}); give more text or a smaller vocabulary"
        ) from error
    tokenizer = SentencePieceTokenizer(path, model=model.getvalue())
    write_atomically(path, model.getvalue())
    return tokenizer


def write_atomically(path: str, data: bytes) -> None:
    """Writes `data` beside `path` and renames it there: readers see all of it or nothing."""
    partial = f"{path}.partial-{os.getpid()}"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Cuts texts after line ends, newlines kept, so that the trainer sees the real characters."""
    used = 0
    for text in texts:
        for line in text.splitlines(keepends=True):
            used += len(line.encode("utf-8"))
            if used > max_bytes:
                return
            # The trainer drops what holds U+2581 or NUL; cut very long lines rather than lose them.
            for start in range(0, len(line), 4096):
                yield line[start : start + 4096]


def _component_types(component: Any) -> set[str]:
    """Types named in a tokenizer.json component, through its Sequences."""
    if not isinstance(component, dict):
        return set()
    types = {str(component.get("type"))}
    for child in component.get("decoders") or component.get("pretokenizers") or ():
        types |= _component_types(child)
    return types


def read_file(path: str, what: str) -> bytes:
    """The bytes of a tokenizer's file; a TokenizerError says what is missing."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise TokenizerError(f"{what} {path!r}: {error.strerror}; check the path") from error


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
