"""Packing against a brute force that walks over documents one token at a time."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.data.batch import IGNORE, idle_batch, pack


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pack_brute_force(documents_strategy, data):
    documents = data.draw(documents_strategy())
    tokens, positions, targets, borders = [], [], [], [0]
    for document in documents:
        n = len(document.tokens)
        for t in range(n):
            tokens.append(int(document.tokens[t]))
            positions.append(t)
            predicts = t + 1 < n and document.targets_mask[t + 1]
            targets.append(int(document.tokens[t + 1]) if predicts else IGNORE)
        borders.append(len(tokens))

    batch = pack(documents)

    assert batch.tokens_T.tolist() == tokens and batch.tokens_T.dtype == torch.int64
    assert batch.positions_T.tolist() == positions and batch.positions_T.dtype == torch.int64
    assert batch.targets_T.tolist() == targets and batch.targets_T.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == borders and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == max(len(document) for document in documents)
    assert batch.num_tokens == len(tokens)
    assert batch.num_targets == sum(document.num_targets for document in documents)
    assert batch.num_targets == sum(target != IGNORE for target in targets)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_targets_stay_inside_their_document(documents_strategy, data):
    """Tokens are unique over all documents here, so a target betrays the document it was taken from."""
    documents = data.draw(documents_strategy())
    batch = pack(documents)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])  # token id -> document
    for t, target in enumerate(batch.targets_T.tolist()):
        assert target == IGNORE or owner[target] == owner[t]


def test_idle_batch_weighs_nothing():
    for batch in (idle_batch(), pack([])):
        assert batch.num_tokens == 1 and batch.num_targets == 0
        assert batch.cu_seqlens.tolist() == [0, 1] and batch.max_seqlen == 1


def test_to_moves_every_tensor():
    moved = idle_batch().to("meta")
    assert {moved.tokens_T.device, moved.positions_T.device, moved.cu_seqlens.device, moved.targets_T.device} == {
        torch.device("meta")
    }
    assert moved.num_targets == 0  # known without reading the device (meta tensors cannot be read)
