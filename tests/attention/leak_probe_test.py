"""No attention lets one document hear of another; and a probe that could not tell would fail here.

`lcl probe` runs every case; here each implementation meets each layout, and each context degree.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lcl.attention import Mask
from lcl.attention.leak_probe import Finding, cases, packings, probe, table

PROBE = """
import json, sys
from lcl.attention.leak_probe import Case, probe_attention
from lcl.models.leak_probe import probe_decoder

cases, decoders = json.loads(sys.argv[1])
findings = []
for case, options in cases:
    findings += probe_attention(Case(*case), **options)
for case in decoders:
    findings += probe_decoder(Case(*case))
    findings += probe_decoder(Case(*case), documents="last")
print(json.dumps([vars(finding) for finding in findings]))
"""
ATTENTION = [
    (("reference",), {}),
    (("blockwise", 1, "zigzag", 16), {}),
    (("ring", 4, "zigzag"), {}),
    (("ring", 8, "striped", 16), {"gradients": False}),
    (("ring", 2, "contiguous"), {"gradients": False, "documents": "last"}),
    (("all_gather", 2, "striped"), {}),
    (("all_gather", 8, "zigzag", 16), {"gradients": False}),
    (("all_gather", 4, "contiguous"), {"gradients": False}),
    (("ulysses", 8, "zigzag"), {"gradients": False}),
    (("ulysses", 4, "striped", 16), {"gradients": False}),
    (("ulysses", 2, "contiguous"), {}),
    (("splash",), {"length": 128, "gradients": False}),
]
DECODERS = [("ring", 4, "zigzag")]


def test_no_document_hears_of_another_and_the_probe_hears_all(run_python):
    output = run_python(PROBE, json.dumps([ATTENTION, DECODERS]), devices=8)
    findings = [Finding(**x) for x in json.loads(output)]
    assert len({finding.case for finding in findings}) == len(ATTENTION) + len(DECODERS)
    bad = [finding for finding in findings if not finding.good]
    assert not bad, f"{bad[:3]}\n{table(findings)}"
    # The control is no formality: there is a great deal to find.
    assert sum(finding.control for finding in findings) > 1000


def dense(mask: Mask, leak: np.ndarray | None = None):
    """Attention in NumPy over scalar tokens; `leak` [B, T, T] opens what the mask closes."""

    def run(x, segment_ids):
        x, segment_ids = np.asarray(x), np.asarray(segment_ids)
        seen = mask.dense(np.arange(x.shape[1]), segment_ids)
        if leak is not None:
            seen = seen | leak
        weights = np.where(seen, np.exp(x[:, None, :]), 0.0)
        return (weights @ x[..., None])[..., 0] / np.maximum(weights.sum(-1), 1e-9)

    return run


def probe_dense(run, documents="first", length=32):
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 8, length))
    row_index = np.broadcast_to(np.arange(length), (8, length))
    return probe(
        run, base, other, name="dense", mask=Mask(), row_index_BT=row_index, documents=documents
    )


@pytest.mark.parametrize("documents", ["first", "last"])
def test_one_open_entry_is_found(documents):
    assert all(finding.good for finding in probe_dense(dense(Mask()), documents))
    # One query of one row sees one key of another document: the token that is changed there.
    clean = probe_dense(dense(Mask()), documents)
    row = 1
    segments = list(packings(32).values())[row]
    token = clean[row].token
    query = int(np.flatnonzero(segments != segments[token])[0])
    leak = np.zeros((8, 32, 32), bool)
    leak[row, query, token] = True
    findings = probe_dense(dense(Mask(), leak), documents)
    assert [finding.leaks for finding in findings] == [0, 1] + [0] * 6
    assert not findings[row].good


def test_a_deaf_kernel_is_not_taken_for_a_tight_one():
    """Attention that answers the same whatever it is told has no leaks, and is refused."""
    findings = probe_dense(lambda x, segment_ids: np.zeros_like(x))
    assert all(finding.leaks == 0 for finding in findings)
    assert not any(finding.good for finding in findings if finding.inside_expected)


def test_the_table_adds_up_by_case():
    one = Finding(
        "a", "two", 3, leaks=1, inside=2, inside_expected=4, control=5, control_expected=6
    )
    text = table([one, one, dataclasses.replace(one, case="b")])
    assert "2" in text.splitlines()[1] and "4 of 8" in text.splitlines()[1]
    assert text.splitlines()[2].split() == "b 1 2 of 4 5 of 6".split()


def test_cases_cover_every_pair():
    found = cases(8)
    for impl in ("ring", "all_gather", "ulysses"):
        for context in (2, 4, 8):
            for layout in ("contiguous", "zigzag", "striped"):
                assert any(case[:3] == (impl, context, layout) for case in found)
