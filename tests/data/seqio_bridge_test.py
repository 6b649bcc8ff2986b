"""SeqIO: a registered task becomes a store, its vocabulary a tokenizer with the same ids.

SeqIO brings TensorFlow, so all of it runs in one child process; nothing is skipped.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from lcl.data.seqio_bridge import SeqioTokenizer, parse_seqio
from lcl.data.store import Data
from lcl.data.tokenizers import load_tokenizer

# A module as a T5X user has one: tasks over functions, with the usual preprocessors.
TASKS = """
import functools, os, sys
import seqio, tensorflow as tf

VOCABULARY = seqio.SentencePieceVocabulary(os.environ["OUR_MODEL"], extra_ids=10)
TEXTS = [f"Article {i}: the quick brown fox, café number {i}." for i in range(40)]

def dataset(split, shuffle_files=False, seed=None):
    texts = TEXTS if split == "train" else TEXTS[:3]
    return tf.data.Dataset.from_tensor_slices({"title": [f"t{i}" for i in range(len(texts))],
                                               "body": texts})

def rename(ds):
    return ds.map(lambda ex: {"inputs": ex["title"], "targets": ex["body"]})

SOURCE = seqio.FunctionDataSource(dataset, splits=["train", "test"],
                                  num_input_examples={"train": 40, "test": 3})
FEATURES = {"inputs": seqio.Feature(VOCABULARY, add_eos=False, required=False),
            "targets": seqio.Feature(VOCABULARY, add_eos=True)}
seqio.TaskRegistry.add("our_task", source=SOURCE, output_features=FEATURES,
    preprocessors=[rename, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
seqio.TaskRegistry.add("our_ids", source=SOURCE,
    output_features={"targets": FEATURES["targets"]},
    preprocessors=[lambda ds: ds.map(lambda ex: {"targets": ex["body"]}),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.preprocessors.append_eos])
seqio.TaskRegistry.add("our_bytes", source=SOURCE,
    output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
    preprocessors=[rename, seqio.preprocessors.tokenize])
seqio.MixtureRegistry.add("our_mixture", ["our_task"], default_rate=1)
"""

CHILD = """
import json, os, sys
root, folder = sys.argv[1:]
os.chdir(folder)
import numpy as np
from lcl import main
from lcl.data.prepare import prepare
from lcl.data.store import Data
code = main.main(["prepare", "--module", "our_tasks", "--seqio", "a=our_task",
                  "--seqio", "b=our_ids", "--seqio", "c=our_task:test",
                  "--root", root, "--tokenizer", "seqio:task=our_task"])
import our_tasks, seqio
vocabulary = our_tasks.VOCABULARY
def texts(domain):
    stores = [Data(root).open(domain, split) for split in ("train", "heldout")]
    return {s.tokenizer().decode(s.document(i)) for s in stores for i in range(s.num_documents)}
tokenizer = Data(root).tokenizer()
probe = "Some café text, and   unknown 漢字 characters."
task = seqio.get_mixture_or_task("our_ids")
examples = list(task.get_dataset(None, split="train", shuffle=False).as_numpy_iterator())
stored = [Data(root).open("b", split) for split in ("train", "heldout")]
stored = {tuple(s.document(i)[1:].tolist()) for s in stored for i in range(s.num_documents)}
errors = []
for options in ({"seqio": {"x": "our_tsak"}}, {"seqio": {"x": "our_task:dev"}},
                {"seqio": {"x": "our_mixture"}},
                {"seqio": {"x": "our_task"}, "tokenizer": "seqio:task=our_bytes"}):
    try:
        prepare(root=root + "2", log=lambda line: None, **options)
    except ValueError as error:
        errors.append(str(error))
byte = prepare(root=root + "3", seqio={"bytes": "our_bytes"}, log=lambda line: None)
print(json.dumps({
    "code": code, "a": sorted(texts("a")), "b": sorted(texts("b")), "c": len(texts("c")),
    "texts": our_tasks.TEXTS, "errors": errors,
    "sizes": [tokenizer.vocab_size, vocabulary.vocab_size],
    "eos": [tokenizer.eos_id, vocabulary.eos_id],
    "ids": [tokenizer.encode(probe).tolist(), vocabulary.encode(probe)],
    "own_ids": stored == {tuple(e["targets"].tolist()) for e in examples},
    "byte": sum(s.num_documents for s in byte),
}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model such as T5's: pad 0, eos 1, unk 2, no bos, no bytes, normalised text."""
    import sentencepiece

    path = tmp_path_factory.mktemp("t5") / "t5.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(
                [f"Article {i}: the quick brown fox, café number {i}. t{i}" for i in range(99)]
            ),
            model_writer=file,
            vocab_size=90,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return str(path)


def test_a_task_becomes_a_store_with_the_tasks_own_ids(model, tmp_path, run_python):
    (tmp_path / "our_tasks.py").write_text(TASKS)
    root = tmp_path / "r"
    output = run_python(CHILD, str(root), str(tmp_path), env={"OUR_MODEL": model})
    got = json.loads(output.splitlines()[-1])
    assert got["code"] == 0
    assert len(got["a"]) == len(got["b"]) == 40 and got["c"] == 3
    assert got["b"] == sorted(got["texts"])
    # Inputs and targets, in one document (the newline is a blank to this model).
    assert got["a"] == sorted(f"t{i} {text}" for i, text in enumerate(got["texts"]))
    assert got["own_ids"]
    assert got["sizes"][0] == got["sizes"][1] and got["eos"][0] == got["eos"][1]
    assert got["ids"][0] == got["ids"][1]
    assert got["byte"] == 40
    assert len(got["errors"]) == 4 and not any("\n" in error for error in got["errors"])
    words = ["did you mean 'our_task'", "it has test, train", "mixture", "ByteVocabulary"]
    assert all(w in e for w, e in zip(words, got["errors"], strict=True)), got["errors"]
    # The store needs neither SeqIO nor TensorFlow, and may be moved.
    root.rename(tmp_path / "moved")
    tokenizer = Data(str(tmp_path / "moved")).tokenizer()
    assert isinstance(tokenizer, SeqioTokenizer) and tokenizer.extra_ids == 10


def test_the_tokenizer_by_its_file(model):
    tokenizer = load_tokenizer(f"seqio:{model},extra_ids=10")
    assert tokenizer.vocab_size == 100 and (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    ids = tokenizer.encode("the quick fox")
    assert tokenizer.decode([0, *ids, 1, 95]) == "the quick fox"
    assert tokenizer.token_num_bytes.shape == (100,)
    # A blank of its own opens the text; else the pieces stand for its bytes.
    assert tokenizer.token_num_bytes[ids].sum() == len("the quick fox") + 1
    assert not tokenizer.token_num_bytes[[0, 1, 2, 95]].any()
    assert np.array_equal(tokenizer.encode_batch(["the quick fox"])[0], ids)
    assert tokenizer.fingerprint != load_tokenizer(f"seqio:{model}").fingerprint
    for spec in (f"{model},extra=3", f"{model},extra_ids=x", "/nowhere.model"):
        with pytest.raises(ValueError) as caught:
            parse_seqio(spec)
        assert "\n" not in str(caught.value)
