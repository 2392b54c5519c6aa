"""Merging in memory: the right numbers while merged, the same bits after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.model.linear import Linear, LinearBase
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
    report = merge_all(model)
    merged = logits_of(model, TOKENS)
    assert [drift.name for drift in report.drifts] == list(adapters(model))
    assert all(drift.max_error == 0.0 < drift.update_norm for drift in report.drifts), "the sum is fp32, as the weight"
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


class Coarse(LinearBase):
    """A quantized base: multiples of 1/16, as integers."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("sixteenths", (weight * 16).round().to(torch.int32))
        self.bias = bias

    def dense_weight(self) -> Tensor:
        return self.sixteenths.float() / 16

    def product(self, x_NI: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_NI, self.dense_weight(), self.bias)

    def storing(self, weight: Tensor) -> Coarse:
        return Coarse(weight, self.bias)


@pytest.mark.parametrize("has_bias", [False, True])
@given(seed=st.integers(0, 2**31))
def test_targets_over_a_quantized_base(has_bias, seed):
    torch.manual_seed(seed)
    original, bias = torch.randn(7, 12), nn.Parameter(torch.randn(7)) if has_bias else None
    base = Coarse(original, bias)
    adapter = LoraConfig(r=3, alpha=3).wrap("x", base, torch.float32, torch.device("cpu"))
    for parameter in adapter.lora_A.weight, adapter.lora_B.weight:
        nn.init.normal_(parameter, std=0.3)
    model = nn.Sequential(adapter)
    update = (adapter.lora_B.weight @ adapter.lora_A.weight).detach()
    exact = base.dense_weight() + update
    x = torch.randn(5, 12)
    expected = {
        "dequantized": (Linear, exact),
        "original": (Linear, original + update),
        "requantized": (Coarse, (exact * 16).round() / 16),
    }
    for target, (kind, weight) in expected.items():
        report = merge_all(model, target, lambda name: original)
        assert type(adapter.base) is kind
        torch.testing.assert_close(adapter.dense_weight(), weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(adapter(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        (drift,) = report.drifts
        error = (weight - exact).abs()
        assert drift.max_error == pytest.approx(error.max().item(), abs=1e-6)
        assert drift.mean_error == pytest.approx(error.mean().item(), abs=1e-6)
        assert drift.update_norm == pytest.approx(update.norm().item(), rel=1e-4)
        assert drift.lost_ratio == pytest.approx((error.norm() / update.norm()).item(), rel=1e-4, abs=1e-5)
        assert f"merged 1 weights ({target})" in str(report) and len(report.table().splitlines()) == 2
        unmerge_all(model)
        assert adapter.base is base


def test_what_cannot_be_merged_is_refused():
    adapter = LoraConfig(r=3).wrap("x", Coarse(torch.randn(7, 12), None), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs that weight, which Coarse no longer has"):
        adapter.merge("original")
    with pytest.raises(ValueError, match="merge target is 'nf4'; valid: dequantized, original, requantized"):
        adapter.merge("nf4")
    assert not adapter.merged


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
    assert ((adapter.base.weight.double() - exact).abs() <= bound).all()
    adapter.unmerge()
    assert adapter.base is base
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
