"""ModelConfig. Oracle: transformers' config classes, their defaults and what they make of both spellings."""

from __future__ import annotations

import copy

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from minift.model.config import ModelConfig

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SIZES = {
    "vocab_size": 29, "hidden_size": 64, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 32,
}  # fmt: skip


def llama(**overrides: object) -> dict[str, object]:
    return {"model_type": "llama", **SIZES, **overrides}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_left_out_mean_what_transformers_means(family):
    theirs = getattr(transformers, f"{FAMILIES[family]}Config")(**SIZES)
    assert ModelConfig.from_hf({"model_type": family, **SIZES}) == ModelConfig.from_hf(theirs.to_dict())


@given(data=st.data())
def test_writing_and_reading_gives_the_same_config(data, hf_settings):
    """Also through transformers, which reads ours and writes its own."""
    family, settings = data.draw(hf_settings())
    config = ModelConfig.from_hf({"model_type": family, **copy.deepcopy(settings)})
    written = config.to_hf(dtype="bfloat16")
    assert ModelConfig.from_hf(written) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"

    v4 = {k: v for k, v in written.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    v5 = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert ModelConfig.from_hf(v4) == ModelConfig.from_hf(v5) == config

    cls = getattr(transformers, f"{FAMILIES[family]}Config")
    theirs = cls(**copy.deepcopy(settings)).to_dict()
    through_theirs = cls.from_dict(copy.deepcopy(written)).to_dict()
    assert ModelConfig.from_hf(through_theirs) == config
    # We spell out YaRN's defaults and derived sizes, and forget a window that no layer uses.
    windows = {"use_sliding_window", "sliding_window", "max_window_layers"}
    keys = theirs.keys() - windows - {"dtype", "architectures", "head_dim", "rope_parameters"}
    assert {k: through_theirs[k] for k in keys} == {k: theirs[k] for k in keys}
    assert theirs["rope_parameters"].items() <= through_theirs["rope_parameters"].items()


def test_layer_types_choose_the_windows():
    hf = {"model_type": "qwen3", **SIZES, "use_sliding_window": True, "sliding_window": 7}
    mixed = ModelConfig.from_hf({**hf, "layer_types": ["sliding_attention", "full_attention"]})
    assert mixed.sliding_windows == (7, None)
    assert ModelConfig.from_hf(mixed.to_hf()) == mixed


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 5], (2, 5)), (None, ()), ([], ())])
def test_stop_tokens(eos, expected):
    config = ModelConfig.from_hf(llama(eos_token_id=eos))
    assert config.eos_token_ids == expected
    assert ModelConfig.from_hf(config.to_hf()) == config


V4_YARN = {"type": "yarn", "factor": 4.0}
V5_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048}


def test_both_rope_spellings_may_be_there_if_they_agree():
    config = ModelConfig.from_hf(llama(rope_scaling=V4_YARN, rope_theta=10000.0, rope_parameters=V5_YARN))
    assert config.rope.rope_type == "yarn"
    with pytest.raises(ValueError, match="contradicts itself"):
        ModelConfig.from_hf(llama(rope_scaling={**V4_YARN, "factor": 2.0}, rope_parameters=V5_YARN))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({}, "None is not supported"),
        ({"model_type": "llama"}, "vocab_size, hidden_size, .* must be there"),
        (llama(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification.*LlamaForCausalLM"),
        (llama(hidden_act="gelu"), "'gelu' is not supported; only 'silu'"),
        (llama(quantization_config={"quant_method": "gptq"}), "quantized .*'gptq'"),
        (llama(attention_dropout=0.1), "attention_dropout 0.1"),
        (llama(rope_scaling={"type": "longrope", "factor": 2.0}), "'longrope', not supported; supported: default"),
        (llama(rope_scaling={"type": "linear"}), "'linear' lacks factor"),
        (llama(rope_scaling={"type": "linear", "factor": 0.0}), "factor .* is 0.0"),
        (llama(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "lacks low_freq_factor, high_freq_factor"),
        (llama(rope_parameters={"full_attention": {"rope_type": "default"}}), "differs from layer to layer"),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (llama(num_key_value_heads=5), "32 attention heads cannot share 5"),
        (llama(head_dim=7), "head_dim is 7.*even"),
        (llama(num_hidden_layers=0), "num_hidden_layers must be there, each a positive integer"),
        (llama(num_attention_heads="32"), "num_attention_heads must be there, each a positive integer"),
        (llama(num_key_value_heads=-1), "num_kv_heads is -1"),
        ({**llama(), "model_type": "mistral", "sliding_window": 0}, "at least 1 token"),
        ({**llama(), "model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({**llama(), "model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window is false"),
        ({**llama(), "model_type": "qwen2", "layer_types": ["full_attention"]}, "1 attention types for 2 layers"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(hf, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf)


def test_old_architecture_spelling_is_the_same_model():
    assert ModelConfig.from_hf(llama(architectures=["LLaMAForCausalLM"])) == ModelConfig.from_hf(llama())
