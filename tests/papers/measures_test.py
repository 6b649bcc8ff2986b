"""What is read off a run's files, against numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lcl.papers.cmr import Curves
from lcl.papers.measures import StreamMeasures
from lcl.papers.stability_gap import Shift

# Two stages of 20 steps, evaluated every 10:      en    fr
EVALS = [
    (0, 0, "start", 5.0, 5.5),
    (10, 0, "interval", 3.0, 4.5),
    (20, 0, "stage_end", 2.0, 4.0),
    (30, 1, "interval", 2.75, 2.5),
    (40, 1, "stage_end", 2.25, 1.5),
]


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


def write_run(folder, evals=EVALS, branches=()):
    names = ("en", "fr")
    card = {
        "stages": [
            {
                "name": name,
                "first_step": 20 * i,
                "num_steps": 20,
                "domains": {name: 1.0},
                "sequence_length": 8,
                "batch_shape": [2, 8],
                "replay": None,
            }
            for i, name in enumerate(names)
        ],
        "flops": {"per_token": {"en": 10.0, "fr": 20.0}},
        "ledger": {
            "en": {"new_tokens": 320, "replayed_tokens": 100, "epochs": 1.0},
            "fr": {"new_tokens": 320, "replayed_tokens": 0, "epochs": 1.0},
        },
        "step": 40,
    }
    (folder / "run_card.json").write_text(json.dumps(card))
    lines = [
        {"step": step, "stage": names[step >= 20], "tokens": 16 * (step + 1), "loss": 1.0}
        for step in range(40)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    written = [
        {
            "step": step,
            "stage_index": index,
            "stage": names[index],
            "kind": kind,
            **({"branch_from": step - 5} if kind == "branch" else {}),
            "domains": {
                "en": {"nats_per_token": en, "bits_per_byte": None, "tokens": 9, "bytes": None},
                "fr": {"nats_per_token": fr, "bits_per_byte": None, "tokens": 9, "bytes": None},
            },
        }
        for step, index, kind, en, fr in (*evals, *branches)
    ]
    (folder / "evals.jsonl").write_text("\n".join(map(json.dumps, written)) + "\n")
    return folder


def test_stream_measures(run_dir):
    found = StreamMeasures(10).measure(run_dir)
    assert found["learned_loss"] == pytest.approx((2.0 + 1.5) / 2)
    assert found["retained_loss"] == pytest.approx((2.25 + 1.5) / 2)
    assert found["forgetting"] == pytest.approx(0.25)  # positive = forgot
    assert found["bwt"] == pytest.approx(0.25)
    assert found["fwt"] == pytest.approx(4.0 - 5.5)
    assert found["transfer_loss"] == pytest.approx(4.0)
    assert found["worst_gap"] == pytest.approx(0.75)
    assert found["recovery_steps"] == 20  # it never came back: the whole stage
    assert found["anytime_loss"] == pytest.approx(np.mean([3.0, 2.0, 2.625, 1.875]))
    assert found["retained_loss/en"] == 2.25 and found["learned_loss/fr"] == 1.5
    assert found["new_tokens"] == 640
    assert found["train_flops"] == 16 * 20 * 10.0 + 16 * 20 * 20.0
    assert not any(name.startswith("annealed") for name in found)
    assert all(np.isfinite(list(found.values())))


def test_annealed_are_the_branches(tmp_path):
    branches = [(20, 0, "branch", 1.75, 3.9), (40, 1, "branch", 2.0, 1.25)]
    found = StreamMeasures(10).measure(write_run(tmp_path, branches=branches))
    assert found["annealed_learned_loss"] == pytest.approx((1.75 + 1.25) / 2)
    assert found["annealed_retained_loss"] == pytest.approx((2.0 + 1.25) / 2)
    assert found["annealed_forgetting"] == pytest.approx(0.25)
    assert found["learned_loss"] == pytest.approx((2.0 + 1.5) / 2)  # the trunk's, as before


def test_a_gap_needs_its_interval(run_dir):
    with pytest.raises(ValueError, match="set HeldOut.every_steps=5"):
        StreamMeasures(5).measure(run_dir)
    assert StreamMeasures(None).measure(run_dir)["worst_gap"] == pytest.approx(0.75)


def test_curves_count_from_the_border(run_dir):
    found = Curves("en", "fr").measure(run_dir)
    assert found == pytest.approx(
        {
            "general@00010": 0.75,
            "general@00020": 0.25,
            "domain@00010": -1.5,
            "domain@00020": -2.5,
            "general_rise": 0.25,
            "domain_change": -2.5,
        }
    )


def test_shift_is_a_v(tmp_path):
    shift = Shift(("en",), "fr", 10)
    found = shift.measure(write_run(tmp_path))
    assert found == pytest.approx(
        {"domain_loss": 1.5, "general_loss": 2.25, "general_gap": 0.75, "general_recovery": 20}
    )
    back = [*EVALS[:-1], (40, 1, "stage_end", 1.9, 1.5)]
    assert shift.measure(write_run(tmp_path, back))["general_recovery"] == 20
    never_rose = [*EVALS[:3], (30, 1, "interval", 1.9, 2.5), (40, 1, "stage_end", 1.8, 1.5)]
    found = shift.measure(write_run(tmp_path, never_rose))
    assert found["general_recovery"] == 0 and found["general_gap"] == pytest.approx(-0.1)
