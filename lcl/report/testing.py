"""A made-up run directory, for tests and for looking at the report without training anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcl.report.writers import MetricsWriter

FLOOR = {"python": 0.95, "manpages-en": 1.35, "manpages-fr": 1.30, "manpages-ja": 1.1}


def write_run(
    run_dir: str | os.PathLike[str],
    *,
    domains: Sequence[str] = ("python", "manpages-en", "manpages-fr"),
    watched: Sequence[str] = (),
    steps_per_stage: int = 120,
    replay: float = 0.0,
    eval_every: int = 20,
    stop: int | None = None,
    seed: int = 0,
    branch_steps: int = 0,
    look_every: int = 0,
    samples: bool = False,
) -> Path:
    """Writes a run with plausible curves: one stage a domain, each forgetting the ones before.

    Args:
        run_dir: where to; need not exist.
        domains: trained, one a stage. watched: evaluated, never trained.
        steps_per_stage: updates a stage.
        replay: fraction of replayed rows; with it less is forgotten.
        eval_every: steps between evaluations.
        stop: updates after which the run was cut; None = it finished.
        seed: of the noise.
        branch_steps: length of an annealed branch that ends with each stage; 0 = none.
        look_every: steps between looks at the gradients' cosine, where text is replayed; 0 = none.
        samples: whether continuations are written at the end of each stage.
    """
    rng = np.random.default_rng(seed)
    run_dir = Path(run_dir)
    everything = (*domains, *watched)
    total = steps_per_stage * len(domains)
    stop = total if stop is None else min(stop, total)
    loss = {d: 5.55 for d in everything}
    new = dict.fromkeys(domains, 0)
    replayed = dict.fromkeys(domains, 0)
    rows, length = 8, 256
    continuations: list[str] = []

    def heldout(share: float = 1.0) -> dict[str, dict[str, float]]:
        scores = {d: v * share for d, v in loss.items()}
        return {
            d: {
                "nats_per_token": round(v, 6),
                "bits_per_byte": round(v / math.log(2) / 0.98, 6),
                "tokens": 16384,
                "bytes": 16100,
            }
            for d, v in scores.items()
        }

    def sampled(step: int, stage: str) -> str:
        return json.dumps(
            {
                "step": step,
                "stage_index": list(domains).index(stage),
                "stage": stage,
                "domain": domains[0],
                "document": 7,
                "prompt": f"The {stage} reader <b>opens</b> & ",
                "continuation": f"closes \x00 what {stage} wrote",
                "ended": False,
                "reference": "closes the file.",
            }
        )

    with MetricsWriter(run_dir, None, tensorboard=False) as writer:
        trained = 0
        for step in range(stop):
            index, inside = divmod(step, steps_per_stage)
            current = domains[index]
            where = {"stage_index": index, "stage": current}
            if branch_steps and (step + branch_steps) % steps_per_stage == 0:
                line = {"step": step + branch_steps, **where, "kind": "branch"}
                writer.evals({**line, "branch_from": step, "domains": heldout(0.95)})
            if step == 0:
                writer.evals({"step": 0, **where, "kind": "start", "domains": heldout()})
            for domain in everything:
                floor = FLOOR.get(domain, 1.2)
                if domain == current:
                    loss[domain] += (floor - loss[domain]) * 0.035
                elif domain in domains[:index]:
                    ceiling = floor + (0.75 if not replay else 0.22)
                    loss[domain] += (ceiling - loss[domain]) * 0.03
                else:  # Not trained yet: any text helps a little with the alphabet.
                    loss[domain] += (3.1 - loss[domain]) * 0.012
            lr = 1e-3 * min(1.0, (step + 1) / 30) * (1 - 0.6 * min(1.0, step / (0.5 * total)))
            line = {
                "step": step,
                "stage": current,
                "loss": np.float32(loss[current] + rng.normal(0, 0.05)),
                "grad_norm": np.float32(0.8 + abs(rng.normal(0, 0.2))),
                "learning_rate": np.float32(lr),
                "tokens": (trained := trained + round(rows * length / (1 - replay))),
                f"loss/{current}": np.float32(loss[current] + rng.normal(0, 0.05)),
            }
            new[current] += rows * length
            if replay and index:
                share = round(rows * length * replay / (1 - replay) / index)
                for domain in domains[:index]:
                    line[f"replay_loss/{domain}"] = np.float32(loss[domain] + rng.normal(0, 0.08))
                    replayed[domain] += share
                if look_every and step % look_every == 0:
                    for layer in range(2):
                        cosine = np.float32(math.cos(step / 9 + layer) / 4)
                        line[f"gradient_cosine/layer_{layer:02d}"] = cosine
                    line["gradient_cosine"] = np.float32(math.cos(step / 9 + 0.5) / 4)
            writer.metrics(line)
            done = step + 1
            if done % 10 == 0:
                speed = 9_500 + rng.normal(0, 250)
                writer.timings(
                    {
                        "step": step,
                        "tokens_per_second": round(speed, 1),
                        "seconds_per_step": round(rows * length / speed, 5),
                        "mfu": 0.38,
                    }
                )
            if done % steps_per_stage == 0:
                writer.evals({"step": done, **where, "kind": "stage_end", "domains": heldout()})
                continuations.append(sampled(done, current))
            elif done % eval_every == 0:
                writer.evals({"step": done, **where, "kind": "interval", "domains": heldout()})
    if samples:
        (run_dir / "samples.jsonl").write_text("".join(f"{line}\n" for line in continuations))
    shape = [round(rows / (1 - replay)), length]
    card = {
        "identity": {"seed": str(seed), "model.num_layers": "4"},
        "config": "# a made-up run\ntrain.seed = 0\ntrain.model = @DecoderConfig()\n"
        "DecoderConfig.num_layers = 4\n",
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.0"},
        "git_revision": "0123456789abcdef",
        "seed": seed,
        "mesh": "one device on 1 cpu",
        "domains": sorted(domains),
        "data": {d: f"{abs(hash_text(d)):016x}" for d in domains},
        "stages": [
            {
                "name": d,
                "first_step": i * steps_per_stage,
                "num_steps": steps_per_stage,
                "domains": {d: 1.0},
                "sequence_length": length,
                "batch_shape": shape if i else [rows, length],
                "replay": {"fraction": replay, "mode": "add"} if replay and i else None,
            }
            for i, d in enumerate(domains)
        ],
        "num_parameters": 868_480,
        "flops": {
            "convention": "model FLOPs: 6 x matmul parameters + attention by visible keys",
            "per_token": dict.fromkeys(domains, 5.6e6),
        },
        "ledger": {
            d: {"new_tokens": new[d], "replayed_tokens": replayed[d], "epochs": new[d] / 2e5}
            for d in domains
        },
        "step": stop if stop == total else 0,
        "compiles": {"train step 8 x 256": 4.21, "evaluation 8 x 256": 1.5},
    }
    (run_dir / "run_card.json").write_text(json.dumps(card, indent=1))
    return run_dir


def hash_text(text: str) -> int:
    """A number for a text that is the same in every process (Python's own hash is not)."""
    import zlib

    return zlib.crc32(text.encode()) * 0x9E3779B97F4A7C15 % 2**64
