"""Rotary tables. Oracle: transformers' rotary module, built from the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minift.model.config import ModelConfig
from minift.model.rope import RopeConfig, rotary_tables


@given(data=st.data(), length=st.integers(1, 100))
def test_tables_equal_transformers(data, length, hf_settings):
    """Frequencies agree to fp32's last bits (2 eps); an angle is position times that, and the factor at most 1.3."""
    _, settings = data.draw(hf_settings("llama"))
    settings["head_dim"] = data.draw(st.sampled_from([4, 16, 64, 128]))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(settings)))
    cos, sin = theirs(torch.zeros(1), torch.arange(length).unsqueeze(0))

    config = ModelConfig.from_hf({"model_type": "llama", **settings})
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    tables = rotary_tables(config.rope, config.head_dim, torch.arange(length), cu_seqlens)
    for ours, expected in zip(tables, (cos[0], sin[0]), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (length, settings["head_dim"] // 2)
        half = expected[:, : settings["head_dim"] // 2]  # transformers repeats the table for the other half
        torch.testing.assert_close(ours, half, rtol=0, atol=1.3 * length * 2 * torch.finfo(torch.float32).eps)


def test_dynamic_frequencies_are_per_document():
    rope = RopeConfig("dynamic", factor=4.0, original_max_position_embeddings=8)
    lengths = [3, 30, 9]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    packed = rotary_tables(rope, 8, positions_T, torch.tensor([0, 3, 33, 42], dtype=torch.int32))
    alone = [
        rotary_tables(rope, 8, torch.arange(length), torch.tensor([0, length], dtype=torch.int32)) for length in lengths
    ]
    for i in range(2):
        assert torch.equal(packed[i], torch.cat([tables[i] for tables in alone]))


@pytest.mark.parametrize("position", [4000, 100_000])
def test_far_positions_keep_fp32_angles(position):
    """Against float64: the angle itself is rounded to fp32 twice, so it is off by at most 2 eps · position."""
    cos, _ = rotary_tables(
        RopeConfig(theta=10000.0), 64, torch.tensor([position]), torch.tensor([0, 1], dtype=torch.int32)
    )
    exact = (position * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)).cos()
    assert (cos[0] - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * position
