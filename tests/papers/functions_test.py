"""Natural documents: which functions, that splits share none, and how they are scored."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from lcl.papers import functions

MODULE = '''
import os

@decorate(1)
def first(x):
    """Doc."""
    def inner():
        return x
    return inner

class A:
    y = 1

    async def second(self):
        pass

    class B:
        def third(self): return 3
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return functions.write(tmp_path_factory.mktemp("functions"), limit_modules=40)


def test_functions_and_methods_but_not_what_is_inside_them():
    found = list(functions.functions_of(MODULE))
    assert [f.split("(")[0].split()[-1] for f in found] == ["@decorate", "second", "third"]
    assert found[0].startswith("@decorate(1)\ndef first") and "def inner" in found[0]
    for text in found:
        ast.parse(text)
    assert list(functions.functions_of("def broken(:")) == []


def test_splits_share_no_module_and_no_function(data):
    tokenizer = data.tokenizer()
    texts, modules = {}, {}
    for split in ("train", "heldout"):
        store = data.open(functions.DOMAIN, split)
        assert store.num_documents >= 5
        texts[split] = [tokenizer.decode(store.document(i)) for i in range(store.num_documents)]
        modules[split] = set(store.meta["source_names"])
    both = texts["train"] + texts["heldout"]
    assert len(set(both)) == len(both)
    assert not modules["train"] & modules["heldout"]


def test_position_marks_cover_the_row():
    assert functions.position_marks(128) == ["0-31", "32-63", "64-127"]
    assert functions.position_marks(100) == ["0-31", "32-63", "64-99"]


def test_documents_are_scored_as_they_are(data):
    store = data.open(functions.DOMAIN, "heldout")
    batches = functions.natural_batches(store, num_documents=7, sequence_length=64, batch_size=4)
    assert [b.tokens.shape for b in batches] == [(4, 64)] * 2
    for batch in batches:
        for i in range(4):
            size = int(batch.loss_weights[i].sum())
            if not size:
                continue
            assert batch.tokens[i, 0] == store.bos_id
            assert (batch.tokens[i, 1:size] == batch.targets[i, : size - 1]).all()
            assert (batch.positions[i, :size] == np.arange(size)).all()
            expected = [0] * min(size, 32) + [1] * max(0, min(size, 64) - 32)
            assert batch.source_ids[i, :size].tolist() == expected
            assert size == 64 or batch.targets[i, size - 1] == store.eos_id
    assert batches[1].loss_weights[3].sum() == 0  # seven documents, so the last row is padding
