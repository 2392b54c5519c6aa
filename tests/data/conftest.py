"""Small made-up documents and a tokenizer trained on the spot, shared by the tests of this folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minift.data.documents import Encoded, Source
from minift.data.tokenizer import Tokenizer


@st.composite
def _documents(draw, min_size: int = 1, max_size: int = 24, max_tokens: int = 20) -> list[Encoded]:
    """Random documents; every token occurs once in all of them, so that a token tells where it came from."""
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=min_size, max_size=max_size))
    made, first = [], 0
    for line, length in enumerate(lengths):
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        tokens = np.arange(first, first + length, dtype=np.int32)
        made.append(Encoded(tokens, np.array(mask, bool), Source("made.jsonl", line + 1)))
        first += length
    return made


@pytest.fixture(scope="session")
def documents_strategy():
    return _documents


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """Byte-level BPE with a few merges (" yes" is one token), ChatML's special tokens, EOS "</s>", no chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant say yes no maybe: the answer is yes"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer.from_folder(folder)
