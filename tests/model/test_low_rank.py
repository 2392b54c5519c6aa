"""LoRA's update against numerical gradients, its dropout, what it saves, and its rounding. Values and gradients without
dropout are in test_linear.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.model.linear import Linear, project
from minift.ops.dropout import draw_seed, dropout, dropout_steps
from minift.peft.lora import LoraLinear

CPU = torch.device("cpu")


def make_lora(in_features, out_features, rank, scale, dropout=0.0, bias=False, dtype=torch.float64) -> LoraLinear:
    base = Linear(in_features, out_features, bias).to(dtype).requires_grad_(False)
    adapter = LoraLinear(base, rank, scale, dropout, dtype, CPU)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradcheck(dropout, trained):
    torch.manual_seed(0)
    adapter = make_lora(5, 4, 3, 0.7, dropout, bias=True)
    adapter.lora_A.weight.requires_grad_(trained[0])
    adapter.lora_B.weight.requires_grad_(trained[1])
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, _A, _B):  # gradcheck changes A and B in place
        torch.manual_seed(1)
        return adapter(x)

    assert torch.autograd.gradcheck(forward, (x, adapter.lora_A.weight, adapter.lora_B.weight))


def update_of(adapter: LoraLinear, x: Tensor, out: Tensor) -> Tensor:
    return out - adapter.base(x)


@settings(max_examples=20)
@given(dropout=st.floats(0.05, 0.9), seed=st.integers(0, 2**31))
def test_dropout_zeroes_inputs_of_the_update_only(dropout, seed):
    torch.manual_seed(seed)
    adapter = make_lora(7, 7, 7, 0.5, dropout)
    for factor in (adapter.lora_A, adapter.lora_B):
        nn.init.eye_(factor.weight)  # so that the update is the dropped input itself, times 0.5
    x = torch.randn(6, 7, dtype=torch.float64)

    torch.manual_seed(seed)
    first = adapter(x)
    torch.manual_seed(seed)
    assert torch.equal(first, adapter(x)), "one seed, one mask"
    assert not torch.equal(first, adapter(x)), "another call, another mask"
    update = update_of(adapter, x, first) / 0.5
    expected = torch.where(update.abs() < 1e-9, 0.0, x / (1 - round(dropout * 2**16) / 2**16))
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)

    adapter.eval()
    torch.testing.assert_close(adapter(x), adapter.base(x) + 0.5 * x, rtol=1e-12, atol=1e-12)


def masks_of(adapters: list[LoraLinear], x: Tensor) -> Tensor:
    """(adapters, *x.shape) bool: what each lets through, told from the outputs of adapters that are identities."""
    outs = project(x, *adapters)
    return torch.stack([update_of(adapter, x, out) != 0 for adapter, out in zip(adapters, outs, strict=True)])


def test_adapters_of_one_input_have_masks_of_their_own():
    """Independent: two masks with p = 1/2 agree on half of the elements, within 5 sigma (but for 1 in 2 million)."""
    torch.manual_seed(0)
    adapters = [make_lora(20, 20, 20, 1.0, 0.5) for _ in range(3)]
    for adapter in adapters:
        nn.init.eye_(adapter.lora_A.weight)
        nn.init.eye_(adapter.lora_B.weight)
        adapter.base.weight.data.zero_()
    masks = masks_of(adapters, torch.ones(1000, 20, dtype=torch.float64))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        agreement = (masks[first] == masks[second]).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / 20000**0.5


@settings(max_examples=30)
@given(
    dropouts=st.lists(st.sampled_from([0.0, 0.3, 0.8]), min_size=1, max_size=3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_gradients_go_through_the_masks_of_forward(dropouts, rank, seed):
    """Of x and every factor, against autograd with the masks written out."""
    torch.manual_seed(seed)
    adapters = [make_lora(5, 4 + i, rank, 0.7, dropout) for i, dropout in enumerate(dropouts)]
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(seed)
    masks = [
        dropout(torch.ones(9, 5, dtype=torch.float64), draw_seed(), dropout_steps(p)) if p else torch.ones(9, 5)
        for p in dropouts
    ]
    torch.manual_seed(seed)
    outs = project(x, *adapters)
    exact = []
    for adapter, p, mask in zip(adapters, dropouts, masks, strict=True):
        scale = 0.7 / (1 - dropout_steps(p) / 2**16)
        exact.append(adapter.base(x) + scale * ((x * mask) @ adapter.lora_A.weight.t()) @ adapter.lora_B.weight.t())
    torch.testing.assert_close(outs, exact, rtol=1e-12, atol=1e-12)
    leaves = [x, *(p for adapter in adapters for p in adapter.parameters() if p.requires_grad)]
    douts = [torch.randn_like(out) for out in outs]
    ours, theirs = (torch.autograd.grad(all_outs, leaves, douts) for all_outs in (outs, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_backward_reads_weights_as_they_are_then(dropout):
    """What FSDP does: between forward and backward the weights move to other storage and the old one is overwritten."""
    torch.manual_seed(0)
    adapter = make_lora(6, 5, 3, 0.5, dropout)
    x = torch.randn(8, 6, dtype=torch.float64)

    def gradients(move: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        out = adapter(leaf)
        if move:
            for parameter in adapter.parameters():
                old = parameter.data
                parameter.data = old.clone()
                old.fill_(float("nan"))
        out.square().sum().backward()
        grads = [leaf.grad, adapter.lora_A.weight.grad, adapter.lora_B.weight.grad]
        adapter.zero_grad()
        return grads

    for still, moved in zip(gradients(move=False), gradients(move=True), strict=True):
        assert torch.equal(still, moved)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saves_only_the_input_and_the_narrow_product(dropout):
    """Nothing of the output's width, no weight and no mask."""
    adapter = make_lora(32, 48, 4, 2.0, dropout, dtype=torch.bfloat16)
    x = torch.randn(64, 32, dtype=torch.bfloat16)  # no gradient: what a frozen base saves for dx is not our business
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x)
    assert sum(saved.values()) == 64 * 32 * 2 + 64 * 4 * 2
    assert saved[x.data_ptr()] == x.nbytes, "x itself is saved, not a copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_its_rounding(dtype):
    """|error| <= 4 eps (|W||x| + s|B||A||x|): half an eps each for W x, s A, A x and the sum, and for B of all that."""
    torch.manual_seed(0)
    adapter = make_lora(64, 48, 8, 1.7, dtype=dtype)
    for factor in (adapter.lora_A, adapter.lora_B):
        factor.float()  # masters in fp32 over a low-precision base are cast for the product
        factor.weight.data = factor.weight.data.to(dtype).float()
    x = torch.randn(32, 64, dtype=dtype)
    W, A, B = (t.detach().double() for t in (adapter.base.weight, adapter.lora_A.weight, adapter.lora_B.weight))
    exact = x.double() @ (W + 1.7 * B @ A).T
    bound = 4 * torch.finfo(dtype).eps * (x.double().abs() @ (W.abs() + 1.7 * B.abs() @ A.abs()).T)
    out = adapter(x)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= bound).all()
    out.sum().backward()
    assert adapter.lora_A.weight.grad.dtype == torch.float32
