"""The run card: atomic, and a refusal that names what differs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from lcl.checkpoints import CheckpointError
from lcl.checkpoints.run_card import (
    check_card,
    differences,
    git_revision,
    read_card,
    versions,
    write_card,
)

IDENTITY = {"seed": 0, "model": {"embed_dim": 64, "rope": {"theta": 1e4}}, "stages": ["a", "b"]}


def test_a_card_comes_back(tmp_path):
    assert read_card(tmp_path / "run") is None
    path = write_card(tmp_path / "run", {"identity": IDENTITY, "ledger": {"py": (1, 2)}})
    assert read_card(tmp_path / "run") == {"identity": IDENTITY, "ledger": {"py": [1, 2]}}
    assert json.loads(path.read_text()) == read_card(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["run_card.json"]


def test_a_crash_while_writing_leaves_the_old_card(tmp_path, monkeypatch):
    write_card(tmp_path, {"a": 1})

    def crash(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\): .* free some space"):
        write_card(tmp_path, {"a": 2})
    assert read_card(tmp_path) == {"a": 1}


def test_a_directory_that_can_not_be_written_or_a_card_that_is_no_json(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write .*give another --run_dir") as error:
        write_card(tmp_path / "file" / "run", {})
    assert "\n" not in str(error.value)
    (tmp_path / "run_card.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't read .*run_card.json"):
        read_card(tmp_path)


def test_every_differing_line_is_named():
    new = {"seed": 1, "model": {"embed_dim": 64, "rope": {"theta": 5e5}}, "stages": ["a", "c", "d"]}
    assert differences(IDENTITY, new) == [
        "seed: 0 -> 1",
        "model.rope.theta: 10000.0 -> 500000.0",
        'stages[1]: "b" -> "c"',
        'stages[2]: absent -> "d"',
    ]
    assert differences(new, {k: v for k, v in new.items() if k != "seed"}) == ["seed: 1 -> absent"]


def test_a_tuple_and_its_list_are_the_same_after_a_round_through_the_file(tmp_path):
    identity = {"betas": (0.9, 0.95), "empty": {}, "sizes": {1: "a"}}
    write_card(tmp_path, {"identity": identity})
    assert differences(read_card(tmp_path)["identity"], identity) == []


def test_a_changed_identity_is_refused_by_name_unless_allowed():
    new = {"seed": 1, "model": {"embed_dim": 65, "rope": {"theta": 2}}, "stages": ["b", "b"]}
    assert check_card(IDENTITY, IDENTITY) == []
    with pytest.raises(CheckpointError) as error:
        check_card(IDENTITY, new)
    message = str(error.value)
    assert "\n" not in message
    assert "another configuration (4 lines): seed: 0 -> 1; model.embed_dim: 64 -> 65;" in message
    assert "; and 1 more; set them back, give another --run_dir, or allow it with" in message
    assert len(check_card(IDENTITY, new, allow_changes=True)) == 4
    with pytest.raises(CheckpointError, match=r"\(1 line\): seed: 0 -> 1; set them back"):
        check_card(IDENTITY, {**IDENTITY, "seed": 1})


def test_versions_and_revision(tmp_path):
    found = versions()
    assert {"lcl", "python", "jax", "orbax-checkpoint"} <= set(found)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == clean + "+changes"
