"""Merging in memory: the right numbers while merged, the same bits after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.model.linear import Linear
from minift.peft.adapter import Adapter
from minift.peft.inject import adapter_parameters, adapters, inject
from minift.peft.lora import LoraConfig
from minift.peft.manage import merge_all, unmerge_all

TOKENS = torch.arange(11) * 3


def randomise(model, scale=0.1):
    torch.manual_seed(1)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=scale)


def test_merged_logits_and_exact_return(tiny_model, logits_of):
    model = tiny_model()
    inject(model, LoraConfig(r=4, targets=["q_proj", "down_proj", "lm_head"]))
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = logits_of(model, TOKENS)
    merge_all(model)
    merged = logits_of(model, TOKENS)
    # fp32: about 10 roundings deep through two blocks, each relative 6e-8 of the largest value
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="merged already"):
        merge_all(model)
    unmerge_all(model)
    assert torch.equal(logits_of(model, TOKENS), adapted)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="not merged"):
        unmerge_all(model)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    log_scale=st.floats(-6, 4),
)
def test_merge_rounds_once_and_unmerge_restores_bits(seed, dtype, log_scale):
    torch.manual_seed(seed)
    base = Linear(12, 7).to(dtype)
    adapter: Adapter = LoraConfig(r=3, alpha=3).wrap("x", base, torch.float32, torch.device("cpu"))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapter.lora_B.weight.data.mul_(10.0**log_scale).clamp_(-3e3, 3e3)
    bits = base.weight.detach().clone().view(torch.int16 if dtype.itemsize == 2 else torch.int32)

    W, A, B = (t.detach().double() for t in (base.weight, adapter.lora_A.weight, adapter.lora_B.weight))
    exact = W + B @ A
    adapter.merge()
    # One rounding of the result to dtype (half an eps), after at most 8 fp32 roundings (6e-8 each) of the terms.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (W.abs() + B.abs() @ A.abs()) + torch.finfo(dtype).tiny
    assert ((base.weight.double() - exact).abs() <= bound).all()
    adapter.unmerge()
    assert torch.equal(base.weight.view(bits.dtype), bits)


def test_tied_weights_are_not_merged_into(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    inject(model, LoraConfig(r=2, targets=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        merge_all(model)
    assert not any(adapter.merged for adapter in adapters(model).values())


def test_dense_weight_is_the_effective_weight(tiny_model):
    model = tiny_model()
    inject(model, LoraConfig(r=2))
    randomise(model)
    adapter = adapters(model)["model.layers.0.mlp.up_proj"]
    unmerged = adapter.dense_weight()
    adapter.merge()
    assert torch.equal(adapter.dense_weight(), unmerged)
    assert adapter.dense_weight().data_ptr() == adapter.base.weight.data_ptr()
