"""A tiny random Llama, in transformers and in minift with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM


def _tiny_llama(tie_word_embeddings: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def hf_llama() -> Callable[..., LlamaForCausalLM]:
    return _tiny_llama


@pytest.fixture
def tiny_model() -> Callable[..., CausalLM]:
    """tie_word_embeddings -> the minift model with `hf_llama`'s weights."""

    def build(tie_word_embeddings: bool = False) -> CausalLM:
        hf = _tiny_llama(tie_word_embeddings)
        model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
        model.load_state_dict(hf.state_dict())
        return model.eval()

    return build


@pytest.fixture
def logits_of() -> Callable[[CausalLM, torch.Tensor], torch.Tensor]:
    """(model, tokens_T of one document) -> logits_TV."""

    def run(model: CausalLM, tokens_T: torch.Tensor) -> torch.Tensor:
        num_tokens = len(tokens_T)
        return model(
            tokens_T, torch.arange(num_tokens), torch.tensor([0, num_tokens], dtype=torch.int32), num_tokens,
            head=lambda hidden_TD, lm_head: lm_head(hidden_TD),
        )  # fmt: skip

    return run
