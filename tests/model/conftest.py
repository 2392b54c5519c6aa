"""Random tiny models of every family, built by transformers, which is the oracle for everything in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
MAX_POSITION_EMBEDDINGS = 24


@st.composite
def _rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    rope_type = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0]))}
    if rope_type != "default":
        rope["factor"] = draw(st.sampled_from([1.5, 2.0, 8.0]))
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from([2.0, 4.0]))}
        rope["original_max_position_embeddings"] = draw(st.sampled_from([8, 16, 64]))
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = draw(st.sampled_from([8, 16, 64]))
        variants: list[dict[str, Any]] = [{}, {"attention_factor": 0.8}, {"mscale": 1.0, "mscale_all_dim": 0.7}]
        variants += [{"mscale": 0.7}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"truncate": False}]
        rope |= draw(st.sampled_from(variants))
    return rope


@st.composite
def _hf_settings(draw: st.DrawFn, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """(family, keyword arguments of the transformers config class)."""
    family = family or draw(st.sampled_from(list(CLASSES)))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    settings: dict[str, Any] = {
        "vocab_size": draw(st.integers(11, 40)),
        "hidden_size": heads * 2 * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(_rope_parameters()),
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": draw(st.sampled_from([2, [2, 3]])),
    }
    if family != "qwen2":  # Qwen2 has no head_dim of its own
        settings["head_dim"] = 2 * draw(st.integers(2, 5))
    else:
        settings["hidden_size"] = heads * 2 * draw(st.integers(2, 4))
    if family in ("llama", "qwen3"):
        settings["attention_bias"] = draw(st.booleans())
    if family == "llama":
        settings["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        settings["sliding_window"] = draw(st.sampled_from([None, 1, 3, 7]))
    if family in ("qwen2", "qwen3"):
        settings["use_sliding_window"] = draw(st.booleans())
        settings["sliding_window"] = draw(st.sampled_from([1, 3, 7]))
        settings["max_window_layers"] = draw(st.integers(0, 3))
    return family, settings


def _build(family: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A transformers model whose biases and norms are random too, so that none can be forgotten unnoticed."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="session")
def hf_settings() -> Callable[..., st.SearchStrategy[tuple[str, dict[str, Any]]]]:
    return _hf_settings


@pytest.fixture(scope="session")
def hf_model() -> Callable[..., PreTrainedModel]:
    return _build


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[..., dict[str, Any]]:
    """family, overrides -> settings of one fixed small model with every optional part of the family switched on."""

    def make(family: str, **overrides: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }  # fmt: skip
        if family != "qwen2":
            settings["head_dim"] = 6
        if family in ("llama", "qwen3"):
            settings["attention_bias"] = True
        if family == "llama":
            settings["mlp_bias"] = True
        if family == "mistral":
            settings["sliding_window"] = 5
        if family in ("qwen2", "qwen3"):
            settings |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        return settings | overrides

    return make


@pytest.fixture(scope="session")
def to_minift() -> Callable[[PreTrainedModel], CausalLM]:
    """The same model with the same weights, without going through files."""

    def convert(hf: PreTrainedModel) -> CausalLM:
        model = CausalLM(ModelConfig.from_hf(hf.config.to_dict()))
        model.load_state_dict(hf.state_dict())
        return model

    return convert


@pytest.fixture(scope="session")
def pack() -> Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor, int]]:
    """Documents -> (tokens_T, positions_T, cu_seqlens, max_seqlen), the arguments of `CausalLM.forward`."""

    def run(documents: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        lengths = [len(document) for document in documents]
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        return torch.cat(documents), positions_T, cu_seqlens, max(lengths)

    return run


@pytest.fixture(scope="session")
def logits() -> Callable[[Tensor, torch.nn.Module], Tensor]:
    """The `head` that returns logits."""
    return lambda hidden_TD, lm_head: lm_head(hidden_TD)
