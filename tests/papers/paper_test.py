"""The machinery at its smallest: each paper trained for a few steps, cached, reported, resumed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lcl import config, main
from lcl.data import Data, Replay
from lcl.describe import describe
from lcl.papers import (
    cmr,
    code,
    dataset_decomposition,
    grid,
    in_context_pretraining,
    infinite_lr,
    mer,
    paper,
    registry,
    stability_gap,
    streams,
)
from lcl.papers.claims import NOT_TESTABLE
from lcl.papers.dataset_decomposition import ARMS, SECONDS, DatasetDecomposition
from lcl.papers.in_context_pretraining import InContextPretraining
from lcl.papers.topics import TopicalCorpus


class FewOrders(InContextPretraining):
    """Half of the arms: what they share is shown as well, in half the time."""

    def runs(self, seed, out):
        kept = ("random", "in-context", "in-context, duplicates pruned")
        return [run for run in super().runs(seed, out) if run.arm in kept]


class FewLayouts(DatasetDecomposition):
    """Not all of the arms, as above."""

    def runs(self, seed, out):
        kept = ("concat", "decomposition", "decomposition, equal seconds")
        return [run for run in super().runs(seed, out) if run.arm in kept]


def fields(small):
    return {field.name: getattr(small, field.name) for field in dataclasses.fields(small)}


ICP = FewOrders(**fields(in_context_pretraining.TINY))
DECOMPOSITION = FewLayouts(**fields(dataset_decomposition.TINY))


@pytest.fixture(scope="module", params=[ICP, DECOMPOSITION], ids=lambda p: p.name)
def done(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param.name)
    lines: list[str] = []
    outcome = paper.reproduce(request.param, seeds=1, out=out, say=lines.append)
    return request.param, out, outcome, lines


def test_every_claim_names_arms_and_metrics_that_are_measured(done):
    small, out, outcome, _ = done
    assert len({claim.name for claim in small.claims}) == len(small.claims)
    arms = {run.arm for run in super(type(small), small).runs(0, out)}
    for claim in small.claims:
        assert {claim.better, claim.worse} <= arms
        for measured in outcome.values.values():
            assert math.isfinite(measured[0][claim.metric])
    assert set(small.columns) <= set(next(iter(outcome.values.values()))[0])


def test_one_seed_decides_nothing(done):
    _, _, outcome, _ = done
    assert {v.verdict for v in outcome.verdicts} == {NOT_TESTABLE}


def test_the_report_is_written(done):
    small, out, outcome, lines = done
    text = (out / paper.TABLE_FILE).read_text()
    assert text == outcome.text + "\n"
    for claim in small.claims:
        assert claim.text in text
    results = json.loads((out / paper.RESULTS_FILE).read_text())
    assert len(results["runs"]) == len(outcome.values)
    assert [v["verdict"] for v in results["verdicts"]] == [NOT_TESTABLE] * len(small.claims)
    png, svg = (out / name for name in paper.FIGURE_FILES)
    assert png.read_bytes().startswith(b"\x89PNG") and b"<svg" in svg.read_bytes()
    assert results["code"] == code.code_hash()
    assert lines[0].startswith(f"run 1 of {len(results['runs'])}: ")


def test_finished_runs_are_not_run_again(done, monkeypatch):
    small, out, outcome, _ = done

    def not_again(**settings):
        raise AssertionError("trained again")

    monkeypatch.setattr(grid, "train", not_again)
    again = paper.reproduce(small, seeds=1, out=out, say=lambda line: None)
    assert again.values == outcome.values
    changed = dataclasses.replace(small, peak=small.peak / 2)
    with pytest.raises(AssertionError, match="trained again"):
        paper.reproduce(changed, seeds=1, out=out, say=lambda line: None)


def test_the_arms_of_a_seed_differ_in_what_they_compare_only(done):
    """Same first weights, same data, same schedule; the stage's layout or order differs."""
    small, out, _, _ = done
    runs = small.runs(0, out)
    equal = [run for run in runs if not run.arm.endswith(SECONDS)]
    lines = [describe({k: v for k, v in run.settings.items() if k != "data"}) for run in equal]
    allowed = ("order", "packing", "document_mask", "decomposition")
    for other, run in zip(lines[1:], equal[1:], strict=True):
        names = {n for n in {*lines[0], *other} if lines[0].get(n) != other.get(n)}
        assert names or run.settings["data"] != equal[0].settings["data"]
        assert all(n.removeprefix("stages[0].data.").startswith(allowed) for n in names)
    # An arm of equal seconds may come out with the very steps of its arm of equal tokens.
    assert len({run.hash for run in equal}) == len(equal)


def test_tokens_are_equal_where_they_should_be(done):
    small, _, outcome, _ = done
    if small.name == ICP.name:
        tokens = {seeds[0]["tokens"] for seeds in outcome.values.values()}
        # A row may be the last one of the store, which is not full.
        assert max(tokens) - min(tokens) < small.sequence_length
    else:
        cells = small.steps * small.batch_size * 2**small.max_log2
        assert outcome.values["decomposition"][0]["tokens"] == cells
        assert all(
            0.8 * cells < outcome.values[arm][0]["tokens"] <= cells
            for arm in ARMS
            if arm in outcome.values
        )


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    """The probe fails after training: the next call probes, and trains nothing anew."""
    run = ICP.runs(0, tmp_path)[0]
    monkeypatch.setattr(grid, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grid.run_one(run, tmp_path)
    monkeypatch.undo()
    before = (tmp_path / "runs" / run.name / "metrics.jsonl").read_bytes()
    result = grid.run_one(run, tmp_path)
    assert result["steps"] == ICP.steps
    assert (tmp_path / "runs" / run.name / "metrics.jsonl").read_bytes() == before


def test_a_changed_code_is_another_run_and_takes_the_old_table_away(done, tmp_path, monkeypatch):
    """The cache answers for code as well: nothing of another code is read or left standing."""
    small, out, _, _ = done
    paper.reproduce(small, seeds=1, out=out, say=lambda line: None)  # the report stands
    for name in (paper.TABLE_FILE, paper.RESULTS_FILE, *paper.FIGURE_FILES):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    if (out / dataset_decomposition.COSTS_FILE).exists():
        monkeypatch.setattr(type(small), "runs", lambda self, seed, _: done_runs(small, out))
    old = {run.hash for run in small.runs(0, out)}
    monkeypatch.setattr(code, "code_hash", lambda: "another")
    assert not old & {run.hash for run in small.runs(0, out)}

    def not_yet(**settings):
        raise AssertionError("trains")

    monkeypatch.setattr(grid, "train", not_yet)
    lines: list[str] = []
    with pytest.raises(AssertionError, match="trains"):
        paper.reproduce(small, seeds=1, out=tmp_path, say=lines.append)
    assert not (tmp_path / paper.TABLE_FILE).exists()
    assert not (tmp_path / paper.RESULTS_FILE).exists()
    assert "another code or configuration" in lines[0]


def done_runs(small, out):
    """The runs as they were made, without measuring what a step costs again."""
    data = Data(str(out / "data"))
    probe = small._probe(data)
    return [
        grid.PaperRun(arm, 0, small.settings(arm, 0, data), probe)
        for arm in ("concat", "decomposition")
    ]


def test_command_refuses_no_seeds(tmp_path, capsys):
    words = ["reproduce", "in_context_pretraining", "--tier", "tiny", "--out", str(tmp_path)]
    assert main.main([*words, "--seeds", "0"]) == 2
    assert "give 1 or more" in capsys.readouterr().err


def arm_settings(name, tmp_path):
    """The arguments of `train` of the arm whose configuration is shipped, without its stores."""
    full, data = registry.load(name), Data("x")
    if name == "dataset_decomposition":
        return full.settings("decomposition", 0, data)
    if name == "in_context_pretraining":
        small = TopicalCorpus(num_topics=8, documents_per_topic=1)
        runs = dataclasses.replace(full, corpus=small, num_rows=1).runs(0, tmp_path)
        (settings,) = [run.settings for run in runs if run.arm == "in-context"]
        return settings
    if name == "mer":
        return full.arm_run("", full.arms()[mer.MER_01], 0, data).settings
    if name == "infinite_lr":
        optimizer, branches = full.optimizer(infinite_lr.INFINITE), full.branches
        stages = full.sequence(Replay(0.25))
        return full.run("", 0, data, stages, optimizer, branches=branches).settings
    if name == "replay_scaling":
        model = full.model("L")
        return full.run(
            "", 0, data, full.sequence(Replay(0.25)), full.adamw(), model=model
        ).settings
    if name == "domain_order":
        optimizer, domains = full.adamw_constant(), full.domains
        return full.run(
            "", 0, data, full.stages(SIMILAR_ORDER), optimizer, domains=domains
        ).settings
    if name == "cmr":
        model = streams.small_decoder(full.sequence_length, cmr.LARGE)
        stages, optimizer, domains = full.stages("1/2"), full.optimizer(), full.domains
        return full.run("", 0, data, stages, optimizer, model=model, domains=domains).settings
    assert name == "stability_gap"
    mixture = full.mixtures("seed")[stability_gap.CURRICULUM]
    stages = (full.pretraining(), streams.stage("continued", mixture, **full.sizes()))
    return full.run("", 0, data, stages, full.optimizer(), domains=full.domains).settings


SIMILAR_ORDER = (
    *("manpages-en", "libreoffice-help-en", "libreoffice-help-fr"),
    *("manpages-fr", "manpages-de", "libreoffice-help-de"),
)


@pytest.mark.parametrize("name", registry.names())
def test_the_shipped_configuration_is_the_papers_own_arm(name, tmp_path):
    """configs/papers/NAME.gin is the method's run of seed 0, so that the two cannot drift apart."""
    loaded = config.load([f"configs/papers/{name}.gin"]).kwargs("train", run_dir="x")
    for argument, wanted in arm_settings(name, tmp_path).items():
        if argument not in ("data", "logging"):
            assert describe(loaded[argument], argument) == describe(wanted, argument)
