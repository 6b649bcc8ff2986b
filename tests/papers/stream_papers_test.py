"""Papers over a stream: their arms differ in what they compare, and one runs from its command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lcl import main
from lcl.describe import describe
from lcl.papers import cmr, domain_order, infinite_lr, mer, registry, replay_scaling, stability_gap
from lcl.papers.cmr_fit import critical_ratio

# Those whose runs are only declared, not prepared by another run.
DECLARED = ("cmr", "domain_order", "infinite_lr", "mer", "replay_scaling")


@pytest.fixture(scope="module", params=DECLARED)
def declared(request, tmp_path_factory):
    tiny = registry.load(request.param, "tiny")
    return tiny, tiny.runs(0, tmp_path_factory.mktemp(request.param))


def test_runs_of_a_seed_are_different_runs(declared):
    tiny, runs = declared
    assert len({run.arm for run in runs}) == len(runs) == len({run.hash for run in runs})
    assert {run.settings["seed"] for run in runs} == {0}


def test_claims_name_runs_or_derived_arms(declared):
    tiny, runs = declared
    arms = {run.arm for run in runs}
    derived = {domain_order.ALONE, mer.MER + mer.FRONTIER, mer.MER_01 + mer.FRONTIER}
    derived |= {cmr._sized(word, w) for word in (cmr.LAW, cmr.LAST) for w in (cmr.SMALL, cmr.LARGE)}
    for claim in tiny.claims:
        assert {claim.better, claim.worse} <= arms | derived, claim.name


def test_arms_differ_in_stages_schedule_and_model_only(declared):
    _, runs = declared
    first = describe({k: v for k, v in runs[0].settings.items() if k != "data"})
    may = ("stages", "optimizer", "objective", "model.", "evaluation.branches")
    for run in runs[1:]:
        lines = describe({k: v for k, v in run.settings.items() if k != "data"})
        changed = {n for n in {*first, *lines} if first.get(n) != lines.get(n)}
        assert all(name.startswith(may) for name in changed), changed


def test_the_controls_of_mer_have_the_compute_they_are_to_have():
    """Rows of a whole run: 25% on top costs 11/9, and so does the longer sequential run."""

    def rows(stages):
        total = 0
        for place, stage in enumerate(stages):
            data = stage.data
            each = data.batch_size
            if data.replay is not None and place:
                each = sum(data.replay.rows_per_step(each))
            total += each * stage.num_steps
        return total

    arms = mer.PAPER.arms()
    plain, replayed = rows(arms[mer.SEQUENTIAL][0]), rows(arms[mer.R25][0])
    assert replayed * 9 == plain * 11
    assert rows(arms[mer.LONGER][0]) == pytest.approx(replayed, rel=0.005)
    assert rows(arms[mer.SUBSTITUTED][0]) == rows(arms[mer.JOINT][0]) == plain
    assert rows(arms[mer.R50][0]) * 3 == plain * 5
    # Evaluations within a stage see slow weights, and there are as many windows as in the paper.
    assert mer.PAPER.interval % mer.PAPER.sync_every == 0
    assert mer.PAPER.steps // mer.PAPER.sync_every == 24


def test_model_sizes_of_replay_scaling_have_the_ratios_of_their_names():
    from lcl.parallel import flops

    paper = replay_scaling.PAPER
    length = paper.sequence_length
    cost = {
        size: flops.train_flops_per_token(paper.model(size), length)
        for size in replay_scaling.SIZES
    }
    assert cost["11/9 S"] / cost["S"] == pytest.approx(11 / 9, rel=0.02)
    assert cost["L"] / cost["S"] == pytest.approx(5 / 3, rel=0.02)
    assert cost["11/9 L"] / cost["L"] == pytest.approx(11 / 9, rel=0.02)
    assert cost["15/11 L"] / cost["L"] == pytest.approx(15 / 11, rel=0.02)


def test_branches_of_the_infinite_arms_begin_in_the_constant_phase():
    paper = infinite_lr.PAPER
    assert paper.steps - paper.anneal_steps >= paper.warmup_steps + paper.cooldown_steps


def test_frontier_is_read_between_its_neighbours():
    line = [
        {"learned_loss": 2.0, "retained_loss": 2.4, "forgetting": 0.4, "worst_gap": 0.5},
        {"learned_loss": 3.0, "retained_loss": 3.0, "forgetting": 0.0, "worst_gap": 0.1},
        {"learned_loss": 2.5, "retained_loss": 2.7, "forgetting": 0.3, "worst_gap": 0.3},
    ]
    read = mer.at_equal_learning(line, 2.75)
    assert read == pytest.approx(
        {"learned_loss": 2.75, "retained_loss": 2.85, "forgetting": 0.15, "worst_gap": 0.2}
    )
    assert mer.at_equal_learning(line, 1.9) == mer.at_equal_learning(line, 3.1) == {}


def test_a_missing_frontier_decides_nothing():
    values = {
        mer.MER: {0: {"learned_loss": 1.0, "forgetting": 0.1}},
        mer.MER_01: {0: {"learned_loss": 2.5, "forgetting": 0.1}},
        **{
            mer.R25 + suffix: {0: {"learned_loss": 2.0 + i, "forgetting": 0.5}}
            for i, suffix in enumerate(mer.RATES)
        },
    }
    derived = mer.PAPER.derive(values, None)
    assert list(derived) == [mer.MER_01 + mer.FRONTIER]
    (claim,) = [c for c in mer.PAPER.claims if c.name == "MER at equal learning"]
    assert claim.decide({**values, **derived}).num_seeds == 0


def test_laws_are_fitted_to_what_was_seen():
    """Curves that obey the laws: these predict them and find the ratio; standing still fails."""
    times = range(8, 168, 8)

    def metrics(ratio):
        found = {}
        for t in times:
            found[f"general@{t:05d}"] = 0.03 * ratio**2 * t**0.5 - 0.001 * t
            found[f"domain@{t:05d}"] = -0.05 * ratio**0.5 * t**0.5
        last = max(times)
        return found | {
            "general_rise": found[f"general@{last:05d}"],
            "domain_change": found[f"domain@{last:05d}"],
        }

    from fractions import Fraction

    values = {
        cmr._sized(ratio, width): {0: metrics(float(Fraction(ratio)))}
        for ratio in (*cmr.FITTED, cmr.HELD_OUT)
        for width in (cmr.SMALL, cmr.LARGE)
    }
    derived = cmr.PAPER.derive(values, None)
    law, last = derived["law, d 48"][0], derived["no change, d 48"][0]
    assert law["general_error"] < 2e-3 < last["general_error"]
    assert law["domain_error"] < 2e-3 < last["domain_error"]
    shares = [float(Fraction(ratio)) for ratio in cmr.FITTED]
    rises = [metrics(share)["general_rise"] for share in shares]
    assert law["critical@0.05"] == critical_ratio(shares, rises, 0.05)
    exact = ((0.05 + 0.16) / (0.03 * 160**0.5)) ** 0.5
    assert law["critical@0.05"] == pytest.approx(exact, abs=2e-3)


def test_orders_of_domains(tmp_path):
    tiny = domain_order.TINY
    data = tiny.data(tmp_path)
    orders = [tiny.orders(seed, data) for seed in range(4)]
    for found in orders:
        for order in found.values():
            assert sorted(order) == sorted(tiny.later)
        assert found[domain_order.RANDOM] != found[domain_order.SIMILAR]
    assert len({found[domain_order.SIMILAR] for found in orders}) == 1
    assert len({found[domain_order.RANDOM] for found in orders}) > 1
    table = domain_order.similarity(data, tiny.domains)
    assert np.allclose(np.diag(table), 1.0) and np.allclose(table, table.T)
    assert domain_order.chain_order([[1, 0.2, 0.9], [0.2, 1, 0.3], [0.9, 0.3, 1]]) == [0, 2, 1]


def test_domain_order_at_the_tiny_tier_by_its_command(tmp_path, capsys):
    """The one that CI runs: corpora, grid, table, figure, verdicts, and again from the cache."""
    words = ["reproduce", "domain_order", "--tier", "tiny", "--seeds", "1"]
    assert main.main([*words, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "similar order, seed 0: " in out and "not testable at this scale" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 5 and list(results["derived"]) == [domain_order.ALONE]
    for name in ("table.txt", "figure.png", "figure.svg"):
        assert (tmp_path / name).stat().st_size > 200
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    # A claim alone: only its two runs are asked for, and they are there; the report stays.
    assert main.main([*words, "--claim", "similar specialises", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "alone: beta" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_best_subset_is_scored_by_a_reference_run(tmp_path):
    """Scores carry the hash of their run; the second call neither trains nor scores again."""
    tiny = stability_gap.TINY
    runs = tiny.runs(0, tmp_path)
    assert {run.arm for run in runs} == set(tiny.mixtures("seed"))
    (scores,) = (tmp_path / "data").glob("*/gamma/scores/*")
    (reference,) = (tmp_path / "runs").iterdir()
    assert reference.name.split("-")[-1] in scores.name
    stamp = scores.stat().st_mtime_ns
    again = tiny.runs(0, tmp_path)
    assert [run.hash for run in again] == [run.hash for run in runs]
    assert scores.stat().st_mtime_ns == stamp
