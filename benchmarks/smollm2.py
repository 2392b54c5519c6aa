"""The model that the engine's benchmarks train: SmolLM2-135M's shapes, random weights, and a loss over one document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.cross_entropy import linear_cross_entropy

VOCAB_SIZE = 49152
_CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip


def make_model(num_layers: int, vocab_size: int = VOCAB_SIZE) -> CausalLM:
    """The same weights in every process."""
    model = CausalLM(ModelConfig.from_hf(_CONFIG | {"num_hidden_layers": num_layers, "vocab_size": vocab_size}))
    model.init_weights(seed=0)
    return model


def loss_of(model: nn.Module, tokens_T: Tensor) -> Tensor:
    """Sum of the losses of every token but the first of one document."""
    inputs_T, targets_T = tokens_T[:-1], tokens_T[1:]
    length = len(inputs_T)
    return model(
        inputs_T,
        torch.arange(length),
        torch.tensor([0, length], dtype=torch.int32),
        length,
        head=lambda hidden_TD, lm_head: linear_cross_entropy(hidden_TD, lm_head, targets_T),
    )
