"""Flat storage gives back what was put in, from memory and from disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.documents import Documents, Encoded, Source


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_round_trip(documents_strategy, data):
    documents = data.draw(documents_strategy(min_size=0))
    in_memory = Documents.from_encoded(documents)
    with tempfile.TemporaryDirectory() as folder:
        in_memory.save(Path(folder))
        for stored in (in_memory, Documents.open(Path(folder))):
            assert len(stored) == len(documents)
            assert stored.lengths.tolist() == [len(document) for document in documents]
            for got, expected in zip(stored, documents, strict=True):
                assert got.tokens.tolist() == expected.tokens.tolist() and got.tokens.dtype == np.int32
                assert got.targets_mask.tolist() == expected.targets_mask.tolist() and got.targets_mask.dtype == bool
                assert got.source == expected.source


def test_indexing_is_a_sequence_s():
    documents = Documents.from_encoded(
        [Encoded(np.full(n, n, np.int32), np.ones(n, bool), Source(f"{n % 2}", n)) for n in (1, 2, 3)]
    )
    assert str(documents[-1].source) == "1:3"
    assert [len(document) for document in documents[1:]] == [2, 3]
    with pytest.raises(IndexError):
        documents[3]


def test_empty_and_crooked_documents_are_refused():
    for tokens, mask in (([], []), ([1, 2], [True])):
        with pytest.raises(ValueError, match="a.json:7.*at least one token"):
            Documents.from_encoded([Encoded(np.array(tokens), np.array(mask, bool), Source("a.json", 7))])
