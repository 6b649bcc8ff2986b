"""Samples of a run: the model's own continuations at the end of each stage, in RUN/samples.jsonl.

What is sampled and how stands in `lcl.evals.samples`; this puts it on the run's mesh and writes it.
The lines are a function of the parameters, the configuration and the step, so a stage's end that
comes again (a run killed just behind it) writes the same lines in the place of the old ones.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcl import files
from lcl.assembly import Assembly, named_key
from lcl.attention import layouts
from lcl.evals.heldout import HeldOut
from lcl.evals.samples import LogitsFn, choose_prompts, make_generate, pad_prompts, sample_line
from lcl.models import Decoder, DecoderConfig
from lcl.models.dense import dense_dot
from lcl.parallel import rules
from lcl.programs import on_mesh
from lcl.stages import Span

__all__ = ["SAMPLES_FILE", "Sampler"]

SAMPLES_FILE = "samples.jsonl"


class Sampler:
    """Writes samples of a run; made once, before the loop.

    Args:
      run: the run.
      run_dir: its directory.
      evaluation: its `samples` and the domains that are evaluated.
    """

    def __init__(self, run: Assembly, run_dir: pathlib.Path, evaluation: HeldOut) -> None:
        assert evaluation.samples is not None
        self._run, self._samples = run, evaluation.samples
        self._path = files.place(run_dir) / SAMPLES_FILE
        self._shape = (evaluation.batch_size, self._samples.row_length)
        self._tokenizer = run.data.tokenizer()
        domains = run.stream.domains if evaluation.domains is None else evaluation.domains
        self._prompts = choose_prompts(run.data, domains, self._samples)
        self._programs: dict[DecoderConfig, Any] = {}

    def write(self, step: int, span: Span, params: Any) -> list[dict[str, Any]]:
        """Samples under the model of a stage, and writes the lines of this step, whole.

        Args:
          step: updates done.
          span: the stage that ends here.
          params: the parameters that are evaluated.

        Returns:
          The lines written.
        """
        generate = self._program(span)
        key = jax.random.fold_in(named_key(self._run.seed, "samples"), step)
        lines = []
        for first in range(0, len(self._prompts), self._shape[0]):
            some = self._prompts[first : first + self._shape[0]]
            tokens, starts = pad_prompts(some, num_rows=self._shape[0], row_length=self._shape[1])
            rows = rules.put_batch(tokens, self._run.mesh)
            with on_mesh(self._run.mesh):
                continued = jax.device_get(
                    generate(params, rows, starts, jax.random.fold_in(key, first))
                )
            lines += [
                sample_line(
                    prompt, tokens, self._tokenizer,
                    step=step, stage_index=span.index, stage=span.stage.name,
                )
                for prompt, tokens in zip(some, np.asarray(continued), strict=False)
            ]  # fmt: skip
        if jax.process_index() == 0:
            kept = [line for line in read_samples(self._path) if line["step"] < step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept + lines)
            files.write_whole(self._path, text.encode())
        return lines

    def _program(self, span: Span) -> Any:
        model = self._run.model_of(span)
        if model not in self._programs:
            generate = make_generate(
                decoder_logits(model, self._run.mesh.shape["context"]),
                length=self._samples.length,
                temperature=self._samples.temperature,
                vocab_size=self._tokenizer.vocab_size,
            )
            # Replicated, so that every process can read all of it.
            whole = jax.sharding.NamedSharding(self._run.mesh, jax.sharding.PartitionSpec())
            self._programs[model] = jax.jit(generate, out_shardings=whole)
        return self._programs[model]


def decoder_logits(model: DecoderConfig, context: int) -> LogitsFn:
    """A decoder's logits after one place of each row, for `lcl.evals.samples.make_generate`.

    Args:
      model: as it runs on the mesh; its rows are permuted where a context axis splits them.
      context: devices that share a row.

    Returns:
      (params, tokens int32[B, T] in order, at int32[B]) -> float32[B, V].
    """
    decoder = Decoder(model)

    def logits_fn(params: Any, tokens_BT: Any, at_B: Any) -> Any:
        length = tokens_BT.shape[1]
        order = layouts.permutation(model.context_layout, length, context)
        places_BT = jnp.broadcast_to(jnp.asarray(order, jnp.int32), tokens_BT.shape)
        hidden_BTD = decoder.apply(
            {"params": params},
            tokens_BT[:, order],
            places_BT,
            row_index_BT=None if model.context_layout == "contiguous" else places_BT,
            method="hidden",
        )
        back = jnp.asarray(np.argsort(order), jnp.int32)  # where each token of the row went
        hidden_BTD = jnp.asarray(hidden_BTD)
        last_BD = jnp.take_along_axis(hidden_BTD, back[at_B][:, None, None], axis=1)[:, 0]
        return dense_dot(last_BD, decoder.head_kernel(params), compute_dtype=model.dtype)

    return logits_fn


def read_samples(path: Any) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl; none where there is no such file."""
    path = files.place(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]
