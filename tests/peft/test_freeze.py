from __future__ import annotations

import pytest
import torch
from torch import nn

from minift.peft.freeze import set_trainable


def names_with(model, *parts):
    return [name for name, _ in model.named_parameters() if any(part in name for part in parts)]


def test_exact_sets(tiny_model):
    model = tiny_model()
    assert set_trainable(model) == [name for name, _ in model.named_parameters()]
    assert set_trainable(model, train=["norm"]) == names_with(model, "norm")
    attention = names_with(model, "layers.1.self_attn")
    assert set_trainable(model, train=[r"layers\.1\."], freeze=["mlp", "norm"]) == attention
    assert [n for n, p in model.named_parameters() if p.requires_grad] == attention
    with pytest.raises(ValueError, match="train: 'layers.7' matches none of"):
        set_trainable(model, train=["layers.7"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        set_trainable(model, train=["norm"], freeze=["norm"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == attention


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_a_tied_weight_answers_to_both_names(tiny_model, pattern):
    model = tiny_model(tie_word_embeddings=True)
    assert set_trainable(model, train=[pattern]) == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" not in set_trainable(model, freeze=[pattern])


def test_packed_weights_cannot_be_trained():
    model = nn.Module()
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    model.register_parameter("scale", nn.Parameter(torch.zeros(4)))
    with pytest.raises(ValueError, match="codes is torch.uint8, packed"):
        set_trainable(model)
    assert set_trainable(model, freeze=["codes"]) == ["scale"]
