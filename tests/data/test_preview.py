"""The preview marks supervised text and nothing else."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from minift.data.documents import Documents, Encoded, Source
from minift.data.preview import preview


def shown(documents, tokenizer, count=3, **console):
    stream = io.StringIO()
    Console(file=stream, width=4000, **console).print(preview(documents, tokenizer, count))
    return stream.getvalue()


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.sampled_from(["yes", " no", "é", "A:", "</s>"]), min_size=2, max_size=8), data=st.data())
def test_brackets_stand_around_supervised_text(byte_tokenizer, parts, data):
    marked = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    parts, marked = [" yes", *parts], [True, *marked]
    pieces = [(byte_tokenizer.encode(part), mark) for part, mark in zip(parts, marked, strict=True)]
    tokens = np.array([token for ids, _ in pieces for token in ids], np.int32)
    mask = np.array([mark for ids, mark in pieces for _ in ids])
    marked[0] = False  # " yes" is one token, and nobody predicts the first
    expected = "".join(f"⟦{part}⟧" if mark else part for part, mark in zip(parts, marked, strict=True))
    documents = Documents.from_encoded([Encoded(tokens, mask, Source("rows[bold].jsonl", 3))])
    text = shown(documents, byte_tokenizer)
    assert expected.replace("⟧⟦", "") in text.splitlines()
    assert f"rows[bold].jsonl:3: {len(tokens)} tokens, {mask[1:].sum()} supervised" in text


def test_colour_instead_of_brackets(byte_tokenizer):
    tokens = np.array(byte_tokenizer.encode("say yes"), np.int32)
    mask = np.arange(len(tokens)) == len(tokens) - 1
    documents = Documents.from_encoded([Encoded(tokens, mask)])
    text = shown(documents, byte_tokenizer, force_terminal=True, color_system="standard")
    assert "say\x1b[32m yes\x1b[0m" in text and "⟦" not in text


def test_spread_over_all_documents_and_cut(byte_tokenizer):
    documents = Documents.from_encoded(
        [Encoded(np.full(700, 65, np.int32), np.ones(700, bool), Source("rows", line)) for line in range(1, 10)]
    )
    text = shown(documents, byte_tokenizer, count=3)
    assert all(f"rows:{line}: " in text for line in (1, 5, 9)) and "rows:2: " not in text
    assert "100 more tokens" in text
    assert shown(documents, byte_tokenizer, count=99).count("rows:") == 9
