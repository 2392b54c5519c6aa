"""Merging in memory: the right numbers while merged, the same bits after."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.model.linear import Linear, LinearBase
from minift.ops.nf4 import dequantize_nf4
from minift.peft.adapter import Adapter
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.inject import adapter_parameters, adapters, inject
from minift.peft.lora import LoraConfig
from minift.peft.manage import is_mergeable, merge_all, unmerge_all
from minift.peft.prompt import PromptConfig
from minift.quant.linear import NF4Linear, QuantConfig

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

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        if add_to_NO is None:
            return torch.nn.functional.linear(x_NI, self.dense_weight(), self.bias)
        return add_to_NO.addmm_(x_NI, self.dense_weight().t())

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


@pytest.mark.parametrize(
    ("config", "tied", "expected"),
    [
        (LoraConfig(r=2), True, True),
        (LoraConfig(r=2, targets=["q_proj", "embed_tokens"]), False, True),
        (LoraConfig(r=2, targets=["q_proj", "embed_tokens"]), True, False),
        (BottleneckConfig(size=2), False, False),
        (PromptConfig(num_virtual_tokens=2), False, False),
    ],
    ids=["tied elsewhere", "embedding", "tied", "bottleneck", "prompt"],
)
def test_what_is_mergeable(tiny_model, config, tied, expected):
    """What `minift merge` would write, before anybody tries (tests/checkpoint/test_merge.py has its refusals)."""
    model = tiny_model(tie_word_embeddings=tied)
    inject(model, config)
    assert is_mergeable(model) == expected


def test_dense_weight_is_the_effective_weight(tiny_model):
    model = tiny_model()
    inject(model, LoraConfig(r=2))
    randomise(model)
    adapter = adapters(model)["model.layers.0.mlp.up_proj"]
    unmerged = adapter.dense_weight()
    adapter.merge()
    assert torch.equal(adapter.dense_weight(), unmerged)
    assert adapter.dense_weight().data_ptr() == adapter.base.weight.data_ptr()


NF4_CASES = {
    "seed": st.integers(0, 2**31),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "quant": st.builds(QuantConfig, block_size=st.sampled_from([32, 64]), double_quant=st.booleans()),
    "shape": st.sampled_from([(64, 96), (7, 33), (5, 128)]),  # whole rows of blocks; nothing whole; few blocks
    "has_bias": st.booleans(),
    "log_scale": st.floats(-4, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("target", ["dequantized", "original", "requantized"])
@settings(max_examples=25, deadline=None)
@given(**NF4_CASES)
def test_targets_over_nf4(target, seed, dtype, quant, shape, has_bias, log_scale):
    """In fp64: the written weight W', the drift, x W'ᵀ beside the unmerged forward, and the bits after `unmerge`.

    W' is within half an eps of the sum of W and the update, both rounded to `dtype` or fp32 first (1.01: products of
    roundings). Merged and unmerged outputs, in fp32, differ by |W' - (W + ΔW)| |x| and the roundings of two sums.
    """
    torch.manual_seed(seed)
    rows, columns = shape
    original, bias = (torch.randn(shape) / 8).to(dtype), nn.Parameter(torch.randn(rows)) if has_bias else None
    meta = NF4Linear(columns, rows, False, quant.block_size, quant.double_quant, dtype, torch.device("meta"))
    meta.bias = bias
    base = meta.storing(original)
    adapter = LoraConfig(r=3, alpha=3).wrap("x", base, torch.float32, torch.device("cpu"))
    nn.init.normal_(adapter.lora_A.weight)
    nn.init.normal_(adapter.lora_B.weight, std=0.1 * 10.0**log_scale)
    before = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    A, B = adapter.lora_A.weight.double(), adapter.lora_B.weight.double()
    update, absolute_update = B @ A, B.abs() @ A.abs()
    W = dequantize_nf4(base.nf4(), torch.float64).view(shape)
    x = torch.randn(5, columns)
    unmerged = adapter(x)

    (drift,) = merge_all(nn.Sequential(adapter), target, lambda name: original).drifts
    merged_base, half_eps, u32 = adapter.base, torch.finfo(dtype).eps / 2, 2.0**-24
    tiny = 2.0**-25 if dtype == torch.float16 else torch.finfo(torch.float32).tiny  # half a subnormal's spacing
    onto = original.double() if target == "original" else W
    exact, slack = onto + update, 6 * u32 * (onto.abs() + absolute_update)
    slack += half_eps * W.abs() + tiny if target != "original" else 0  # `dense_weight` rounds W
    if target == "requantized":
        assert isinstance(merged_base, NF4Linear) and repr(merged_base) == repr(base)
        written = dequantize_nf4(merged_base.nf4(), torch.float64).view(shape)
        stored_in_dtype = merged_base.dense_weight().double()
    else:
        assert isinstance(merged_base, Linear) and merged_base.weight.dtype == dtype
        written = stored_in_dtype = merged_base.weight.double()
        assert ((written - exact).abs() <= 1.01 * (half_eps * exact.abs() + slack) + tiny).all()

    # The report compares weights in `dtype`: W as `dense_weight` has it, and the merged one likewise.
    W_in_dtype = base.dense_weight().double()
    error, fp32 = (stored_in_dtype - (W_in_dtype + update)).abs(), 6 * u32 * (W_in_dtype.abs() + absolute_update)
    assert abs(drift.error_norm - error.norm()) <= fp32.norm()
    assert abs(drift.update_norm - update.norm()) <= fp32.norm()
    assert abs(drift.max_error - error.max()) <= fp32.max()
    assert abs(drift.mean_error - error.mean()) <= fp32.mean()

    if dtype == torch.float32:
        sums = (columns + 8) * u32 * ((W.abs() + written.abs() + absolute_update) @ x.double().abs().t()).t()
        sums += 4 * u32 * (0 if bias is None else bias.double().abs())
        bound = x.double().abs() @ (written - (W + update)).abs().t() + 1.01 * sums
        assert ((adapter(x).double() - unmerged.double()).abs() <= bound).all()

    adapter.unmerge()
    assert adapter.base is base and adapter(x).equal(unmerged)
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapter.named_parameters())


@torch.no_grad()
def test_requantized_is_the_nearest_on_the_grid_of_the_sum():
    """Codes and scales are those of bitsandbytes for the fp32 sum."""
    torch.manual_seed(0)
    meta = NF4Linear(96, 64, False, 64, True, torch.bfloat16, torch.device("meta"))
    adapter = LoraConfig(r=3, alpha=3).wrap("x", meta.storing(torch.randn(64, 96)), torch.float32, torch.device("cpu"))
    for parameter in adapter.lora_A.weight, adapter.lora_B.weight:
        nn.init.normal_(parameter, std=0.3)
    exact = adapter.exact_weight(adapter.base.dense_weight())
    adapter.merge("requantized")
    codes, state = bnb.quantize_4bit(exact, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(adapter.base.codes, codes.view(-1)) and torch.equal(adapter.base.scales, state.absmax)
