"""Runs in a bucket: the small files are there whole, and a resumed run's are those of a local one.

The bucket is a file system of fsspec's kept in memory under the scheme gs, which etils then reads
and writes as it would Google's. Checkpoints go to a bucket by Orbax and TensorStore, which need the
real one: here they lie in a local folder.
"""

from __future__ import annotations

import json

import pytest

from lcl import files

BUCKET = """
import os, fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol("/" + os.fspath(path).removeprefix("gs://").lstrip("/"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), f"a bucket has no mode {mode}"
        return super()._open(path, mode, **options)


fsspec.register_implementation("gcs", Bucket, clobber=True)
"""

RUN = (
    BUCKET
    + """
import dataclasses, json, pathlib, shutil, sys
import lcl.train
from lcl import main
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.policies import Logging, leave_out, read_left_out
from tests import tiny

base = pathlib.Path(sys.argv[1])
snapshot = {}


class Local(Checkpointer):
    def __init__(self, run_dir, *more, **options):
        place = base / "checkpoints-of-it" if "://" in str(run_dir) else run_dir
        super().__init__(place, *more, **options)

    def save(self, step, *more, **options):
        saved = super().save(step, *more, **options)
        if step == 8 and "of-it" in str(self.directory):  # what a machine lost now would leave
            self.wait()
            snapshot["bucket"] = {k: bytes(v.getbuffer()) for k, v in Bucket.store.items()}
            shutil.copytree(self.directory, base / "saved")
        return saved


lcl.train.Checkpointer = Local
show = Logging(every_steps=2, tensorboard=True, progress=False, report=True)
text = "train.seed = 0\\n"
once = tiny.settings(base / "stores", "gs://bucket/run", logging=show, config_text=text)
lcl.train.train(**once)
page = Bucket.store["/bucket/run/report/index.html"].getvalue()
assert b"<html" in page and not pathlib.Path("gs:").exists()
once["logging"] = dataclasses.replace(show, report=False)
lcl.train.train(**once | {"run_dir": str(base / "local")})

# The machine was lost after the save at step 8; another one goes on.
for name in list(Bucket.store):
    Bucket.store.pop(name)
bucket = Bucket()
for name, data in snapshot["bucket"].items():
    bucket.pipe_file(name, data)
shutil.rmtree(base / "checkpoints-of-it" / "checkpoints")
shutil.move(base / "saved", base / "checkpoints-of-it" / "checkpoints")
steps = [json.loads(x)["step"] for x in bucket.cat("/bucket/run/metrics.jsonl").splitlines()]
assert steps == list(range(8)), steps
lcl.train.train(**once)
for name in ("metrics.jsonl", "evals.jsonl", "config.gin"):
    assert bucket.cat(f"/bucket/run/{name}") == (base / "local" / name).read_bytes(), name
card = json.loads(bucket.cat("/bucket/run/run_card.json"))
assert card["identity"] == json.loads((base / "local" / "run_card.json").read_text())["identity"]
assert len(bucket.ls("/bucket/run/tensorboard")) == 2
assert read_left_out("gs://bucket/run") == frozenset()
leave_out("gs://bucket/run", 3)
assert read_left_out("gs://bucket/run") == {3}
assert main.main(["info", "gs://bucket/run"]) == 0
print("ok")
"""
)


def test_a_run_in_a_bucket_is_the_local_run_and_goes_on(run_python, tmp_path):
    out = run_python(RUN, str(tmp_path), env={"EPATH_USE_TF": "false"})
    assert "run: finished" in out and out.endswith("ok\n"), out


NO_DRIVER = """
import sys
sys.modules["gcsfs"] = None
from lcl import main
sys.exit(main.main(["info", "gs://bucket/run"]))
"""


def test_a_bucket_that_nothing_can_reach_is_one_line(tmp_path, run_python):
    code = NO_DRIVER.replace("sys.exit(", "print(")
    assert run_python(code, env={"EPATH_USE_TF": "false"}) == "2\n"


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="ftp://host/run: use a local path, or one that begins"):
        files.place("ftp://host/run")


def test_a_local_file_is_replaced_whole(tmp_path):
    target = tmp_path / "new" / "card.json"
    for value in (1, 2):
        files.write_whole(target, json.dumps(value).encode())
        assert target.read_text() == str(value)
    assert [p.name for p in target.parent.iterdir()] == ["card.json"]
