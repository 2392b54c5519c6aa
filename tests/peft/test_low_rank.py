"""The low-rank update against a dense fp64 formula, against numerical gradients, and against moving weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minift.model.linear import Linear
from minift.peft.lora import LoraLinear
from minift.peft.low_rank import add_low_rank_

CPU = torch.device("cpu")


def make_lora(in_features, out_features, rank, scale, dropout=0.0, bias=False, dtype=torch.float64) -> LoraLinear:
    base = Linear(in_features, out_features, bias).to(dtype).requires_grad_(False)
    adapter = LoraLinear(base, rank, scale, dropout, dtype, CPU)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    rank=st.integers(1, 10),
    scale=st.floats(0.1, 8.0),
    bias=st.booleans(),
    x_needs_grad=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_formula(
    leading, in_features, out_features, rank, scale, bias, x_needs_grad, contiguous, seed
):  # fmt: skip
    torch.manual_seed(seed)
    adapter = make_lora(in_features, out_features, rank, scale, bias=bias)
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    if not contiguous:
        x = torch.randn(in_features, *leading, dtype=torch.float64).movedim(0, -1)
    x.requires_grad_(x_needs_grad)
    dout = torch.randn(*leading, out_features, dtype=torch.float64)
    A, B = adapter.lora_A.weight, adapter.lora_B.weight

    out = adapter(x)
    out.backward(dout)

    # The oracle is autograd through one dense matrix.
    x_dense, A_dense, B_dense = (t.detach().clone().requires_grad_() for t in (x, A, B))
    bias_term = adapter.base.bias if bias else 0.0
    expected = x_dense @ (adapter.base.weight + scale * B_dense @ A_dense).T + bias_term
    expected.backward(dout)
    # fp64, at most ~200 products of size ~scale * 10 per sum: 1e-11 is 1000 times their rounding.
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(A.grad, A_dense.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(B.grad, B_dense.grad, rtol=1e-11, atol=1e-11)
    if x_needs_grad:
        torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-11, atol=1e-11)
    assert adapter.base.weight.grad is None
    assert not bias or adapter.base.bias.grad is None


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


@settings(max_examples=20, deadline=None)
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
    update = (first - adapter.base(x)) / 0.5
    expected = torch.where(update.abs() < 1e-9, 0.0, x / (1 - round(dropout * 2**16) / 2**16))
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)

    adapter.eval()
    torch.testing.assert_close(adapter(x), adapter.base(x) + 0.5 * x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_mean(dropout):
    """Elements are 0 or x/(1-p), and the share of zeros is p: binomial, so within 5 sigma (but for 1 in 2 million)."""
    torch.manual_seed(0)
    num, width = 2000, 20
    x = torch.ones(num, width)
    eye = torch.eye(width)
    out = add_low_rank_(torch.zeros(num, width), x, nn.Parameter(eye), nn.Parameter(eye.clone()), 1.0, dropout)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - dropout)))
    sigma = (dropout * (1 - dropout) / (num * width)) ** 0.5
    assert abs((~kept).float().mean().item() - dropout) < 5 * sigma


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


@pytest.mark.parametrize(
    ("dropout", "expected_bytes"),
    # x: 64*32*2 bytes; h: 64*4*2; with dropout a mask of 64*32 bytes. Nothing of the output's width, no weight.
    [(0.0, 64 * 32 * 2 + 64 * 4 * 2), (0.1, 64 * 32 * 2 + 64 * 4 * 2 + 64 * 32)],
)
def test_saves_only_the_input_and_the_narrow_product(dropout, expected_bytes):
    adapter = make_lora(32, 48, 4, 2.0, dropout, dtype=torch.bfloat16)
    x = torch.randn(64, 32, dtype=torch.bfloat16)  # no gradient: what a frozen base saves for dx is not our business
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x)
    assert sum(saved.values()) == expected_bytes
    assert saved[x.data_ptr()] == x.nbytes, "x itself is saved, not a copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_its_rounding(dtype):
    """|error| <= 4 eps (|W||x| + s|B||A||x|): one rounding each of W x, A x and the sum, and B of the rounded A x."""
    torch.manual_seed(0)
    adapter = make_lora(64, 48, 8, 2.0, dtype=dtype)
    for factor in (adapter.lora_A, adapter.lora_B):
        factor.float()  # masters in fp32 over a low-precision base are cast for the product
        factor.weight.data = factor.weight.data.to(dtype).float()
    x = torch.randn(32, 64, dtype=dtype)
    W, A, B = (t.detach().double() for t in (adapter.base.weight, adapter.lora_A.weight, adapter.lora_B.weight))
    exact = x.double() @ (W + 2.0 * B @ A).T
    bound = 4 * torch.finfo(dtype).eps * (x.double().abs() @ (W.abs() + 2.0 * B.abs() @ A.abs()).T)
    out = adapter(x)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= bound).all()
    out.sum().backward()
    assert adapter.lora_A.weight.grad.dtype == torch.float32
