"""Samples: how the model goes on from the beginning of a held-out document, as text one can read.

    document     bos The file is read bef|ore the signal arrives. ...
    prompt       bos The file is read bef|                                  its first tokens
    model                                |ore the file is read before       token by token, to eos
    reference                            |ore the signal arrives. ...       what really stood there

A loss says how much was forgotten; a continuation shows what. Every token is a whole forward over
the row, without a cache of keys and values: some rows, some dozens of tokens, at stage ends only,
and it runs on every mesh and attention on which the evaluation runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax

# (params, tokens int32[B, T], at int32[B]) -> float32[B, V], the logits after the token at `at`.
LogitsFn = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which continuations a run writes at the end of each stage, to RUN/samples.jsonl.

    Attributes:
        num_per_domain: prompts of each evaluated domain, always the same documents.
        prompt_length: tokens of a prompt, bos included; a shorter document gives its first half.
        length: tokens that the model adds; an eos ends the text before.
        temperature: 0 = the likeliest token each time; above, drawn by a key named by seed and
            step.

    >>> Samples().row_length
    128
    """

    num_per_domain: int = 2
    prompt_length: int = 64
    length: int = 64
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_per_domain", "prompt_length", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Samples.{name}={value!r} must be a whole number of at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"Samples.temperature={self.temperature!r} must be 0 (greedy) or a finite number "
                "above"
            )

    @property
    def row_length(self) -> int:
        """Tokens of a row: prompt and continuation."""
        return self.prompt_length + self.length


class Prompt(NamedTuple):
    """The beginning of a held-out document.

    domain: its name; document: the document's id; tokens: int32[at most prompt_length]; reference:
    int32, what follows in the document, at most `length` tokens, without eos.
    """

    domain: str
    document: int
    tokens: np.ndarray
    reference: np.ndarray


def choose_prompts(data: Any, domains: Sequence[str], samples: Samples) -> list[Prompt]:
    """The prompts of every domain: the same documents in every run, whatever its seed.

    Args:
        data: where the stores are (`lcl.data.Data`).
        domains: names, in the order in which the prompts come.
        samples: how many, how long.

    Returns:
        At most num_per_domain a domain: documents as long as a whole row first, then shorter ones.
    """
    from lcl.data.ordering import named_key, shuffle_with_key

    prompts = []
    for domain in domains:
        store = data.open(domain, "heldout")
        key = named_key("samples", domain, bits=128)
        order = shuffle_with_key(store.num_documents, key)
        short = np.asarray(store.lengths)[order] <= samples.row_length  # eos is no text
        for index in order[np.argsort(short, kind="stable")][: samples.num_per_domain].tolist():
            tokens = np.asarray(store.document(index), np.int32)
            text, cut = tokens[:-1], samples.prompt_length
            if len(text) < samples.row_length:
                cut = min(cut, max(1, len(text) // 2))
            prompts.append(
                Prompt(
                    domain,
                    int(store.document_ids[index]),
                    text[:cut],
                    text[cut : cut + samples.length],
                )
            )
    return prompts


def make_generate(
    logits_fn: LogitsFn, *, length: int, temperature: float = 0.0, vocab_size: int | None = None
) -> Callable[[Any, Any, Any, Any], jax.Array]:
    """The continuation as one pure function, jitted by the caller.

    Args:
        logits_fn: (params, tokens_BT, at_B) -> float32[B, V], the logits of the token after the one
            at place `at` of each row; what stands behind that place must not matter.
        length: tokens to add.
        temperature: 0 = the likeliest; above, logits are divided by it and drawn from.
        vocab_size: draw only ids below it (a model's vocabulary may be padded).

    Returns:
        (params, tokens int32[B, T], starts int32[B], key) -> int32[B, length]: row b is continued
        from place starts[b] on; `key` is not looked at when the temperature is 0. starts + length
        must not exceed T.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def count(params, tokens, at):  # a "model" that counts
        ...     last = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
        ...     return jax.nn.one_hot(last + 1, 10)
        >>> generate = make_generate(count, length=3)
        >>> rows = jnp.array([[5, 0, 0, 0, 0], [1, 2, 0, 0, 0]])
        >>> generate(None, rows, jnp.array([1, 2]), jax.random.key(0)).tolist()
        [[6, 7, 8], [3, 4, 5]]
    """
    import jax
    import jax.numpy as jnp

    def generate(params: Any, tokens_BT: Any, starts_B: Any, key: Any) -> jax.Array:
        rows_B = jnp.arange(tokens_BT.shape[0])

        def add_one(i: Any, tokens_BT: Any) -> Any:
            logits_BV = logits_fn(params, tokens_BT, starts_B + i - 1)
            if vocab_size is not None:
                logits_BV = logits_BV[:, :vocab_size]
            if temperature:
                next_B = jax.random.categorical(
                    jax.random.fold_in(key, i), logits_BV.astype(jnp.float32) / temperature
                )
            else:
                next_B = jnp.argmax(logits_BV, axis=-1)
            return tokens_BT.at[rows_B, starts_B + i].set(next_B.astype(tokens_BT.dtype))

        done_BT = jax.lax.fori_loop(0, length, add_one, tokens_BT)
        places_BL = starts_B[:, None] + jnp.arange(length)
        return jnp.take_along_axis(done_BT, places_BL, axis=1)

    return generate


def pad_prompts(
    prompts: Sequence[Prompt], *, num_rows: int, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as rows: (int32[num_rows, row_length], starts int32[num_rows]).

    Rows that are left over repeat the last prompt: their continuations are thrown away.
    """
    assert 0 < len(prompts) <= num_rows, (len(prompts), num_rows)
    tokens = np.zeros((num_rows, row_length), np.int32)
    starts = np.zeros(num_rows, np.int32)
    for row in range(num_rows):
        some = prompts[min(row, len(prompts) - 1)].tokens
        tokens[row, : len(some)] = some
        starts[row] = len(some)
    return tokens, starts


def sample_line(
    prompt: Prompt, continuation: np.ndarray, tokenizer: Any, **where: Any
) -> dict[str, Any]:
    """A line of samples.jsonl: {..., "domain", "document", "prompt", "continuation", "reference"}.

    Args:
        prompt: what was continued.
        continuation: int32[length]; read up to its first eos.
        tokenizer: with `decode` and `eos_id`.
        **where: "step", "stage", ...; they come first.
    """
    ends = np.flatnonzero(continuation == tokenizer.eos_id)
    kept = continuation[: ends[0]] if len(ends) else continuation
    return {
        **where,
        "domain": prompt.domain,
        "document": prompt.document,
        "prompt": tokenizer.decode(prompt.tokens),
        "continuation": tokenizer.decode(kept),
        "ended": bool(len(ends)),
        "reference": tokenizer.decode(prompt.reference),
    }
