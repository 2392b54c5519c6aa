"""LoRA's update against numerical gradients, its dropout, what it saves, and its rounding. Values and gradients without
dropout are in test_project.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minift.model.low_rank
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.linear import Linear, LinearBase
from minift.model.project import project
from minift.ops.dropout import draw_seed, dropout, dropout_steps
from minift.ops.low_rank import factor_gradients_, to_rank, to_rank_and_gradients_
from minift.peft.inject import inject
from minift.peft.lora import LoraConfig, LoraLinear
from minift.quant.linear import NF4Linear

CPU = torch.device("cpu")


def make_lora(
    in_features, out_features, rank, scale, dropout=0.0, bias=False, dtype=torch.float64, nf4=False
) -> LoraLinear:
    """Random in everything. nf4: the base weight is in NF4, in blocks of 32."""
    base: LinearBase = Linear(in_features, out_features, bias).to(dtype).requires_grad_(False)
    if nf4:
        weight = torch.randn(out_features, in_features)
        base = NF4Linear(in_features, out_features, bias, 32, True, dtype, CPU).storing(weight)
    adapter = LoraLinear(base, rank, scale, dropout, dtype, CPU)
    for parameter in adapter.parameters():
        if parameter.is_floating_point():
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
    nf4=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_gradients_go_through_the_masks_of_forward(dropouts, rank, nf4, seed):
    """Of x and every factor, against autograd with the masks written out."""
    torch.manual_seed(seed)
    adapters = [make_lora(5, 4 + i, rank, 0.7, p, bias=nf4, nf4=nf4) for i, p in enumerate(dropouts)]
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
        update = scale * ((x * mask) @ adapter.lora_A.weight.t()) @ adapter.lora_B.weight.t()
        exact.append(F.linear(x, adapter.base.dense_weight(), adapter.base.bias) + update)
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
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_saves_only_the_input_and_the_narrow_product(nf4, dropout):
    """Nothing of the output's width, no weight and no mask."""
    adapter = make_lora(32, 48, 4, 2.0, dropout, dtype=torch.bfloat16, nf4=nf4)
    x = torch.randn(64, 32, dtype=torch.bfloat16)  # no gradient: what a frozen base saves for dx is not our business
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x)
    assert sum(saved.values()) == 64 * 32 * 2 + 64 * 4 * 2
    assert saved[x.data_ptr()] == x.nbytes, "x itself is saved, not a copy"


def products_of(run) -> list[tuple[str, int, int]]:
    """What `low_rank` asks for while `run` runs: op, number of wide matrices, number of factors."""
    calls: list[tuple[str, int, int]] = []

    def watched(op, wides: int, factors: int):
        def call(*args):
            calls.append((op.__name__, len(args[wides]), len(args[factors])))
            return op(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minift.model.low_rank, "to_rank", watched(to_rank, 0, 1))
        patch.setattr(minift.model.low_rank, "factor_gradients_", watched(factor_gradients_, 1, 0))
        both = watched(to_rank_and_gradients_, 0, 1)
        patch.setattr(minift.model.low_rank, "to_rank_and_gradients_", both)
        run()
    return calls


def test_adapters_of_one_input_go_through_the_rank_together():
    """In a block as it is: q, k, v share one, gate and up another. Their gradients of A, too, come from one x."""
    config = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 16, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
            "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    model = CausalLM(config)
    inject(model, LoraConfig(r=2, alpha=2.0), seed=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    outs = []

    def forward() -> None:
        head = lambda hidden_TD, lm_head: hidden_TD  # noqa: E731
        outs.append(model(torch.arange(9), torch.arange(9), bounds, 9, head=head))

    def backward_of(count: int) -> list[tuple[str, int, int]]:
        return [("to_rank_and_gradients_", count, count), ("factor_gradients_", 1, count)]

    qkv, o, gate_up, down = 3, 1, 2, 1
    assert products_of(forward) == [("to_rank", 1, count) for count in (qkv, o, gate_up, down)]
    backward = [*backward_of(down), *backward_of(gate_up), *backward_of(o), *backward_of(qkv)]
    assert products_of(lambda: outs[0].sum().backward()) == backward


def away_from_zero(*shape: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes in [1/4, 2): no subnormals in fp16, and no overflow of the sums below."""
    values = torch.empty(shape).uniform_(0.25, 2.0) * (torch.randint(2, shape) * 2 - 1)
    return values.to(dtype)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masters=st.booleans(),
    nf4=st.booleans(),
    out_features=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    in_features=st.one_of(st.integers(1, 40), st.just(32)),
    num_tokens=st.integers(1, 40),
    rank=st.integers(1, 8),
    scale=st.floats(0.5, 4.0),
    seed=st.integers(0, 2**31),
)
def test_low_precision_stays_within_its_rounding(
    dtype, masters, nf4, out_features, in_features, num_tokens, rank, scale, seed
):
    """Outputs and every gradient against fp64 with the same weights. Errors are counted in roundings (u, half an eps)
    of the products of magnitudes; sums of n terms in fp32 add n 2^-24 of them, twice if both factors are such sums.

        out    W x and the sum with the update, 2 u; in NF4 W may be rounded once more.
               Update: s A, B (fp32 masters), h and the sum: 4 u
        dA     B, g and the result: 3 u        dB    s A, h and the result: 3 u
        dx     k projections: a sum for each, of two roundings for NF4, and one for the update: (2 k + 1) u of the base,
               with W one more; A, B and g besides: 4 u of the update
    """
    torch.manual_seed(seed)
    adapters = [make_lora(in_features, size, rank, scale, dtype=dtype, nf4=nf4) for size in out_features]
    for adapter in adapters:
        if not nf4:
            adapter.base.weight.data = away_from_zero(*adapter.base.weight.shape, dtype=dtype)
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.weight.data = away_from_zero(*factor.weight.shape, dtype=torch.float32 if masters else dtype)
    x = away_from_zero(num_tokens, in_features, dtype=dtype).requires_grad_()
    douts = [away_from_zero(num_tokens, size, dtype=dtype) for size in out_features]
    outs = project(x, *adapters)
    torch.autograd.backward(outs, douts)

    unit, tiny = torch.finfo(dtype).eps / 2, 2.0**-24

    def check(what: str, ours: Tensor, exact: Tensor, size: Tensor, roundings: int, terms: int) -> None:
        assert ((ours.double() - exact).abs() <= (1.1 * roundings * unit + 2 * terms * tiny) * size).all(), what

    X, dx, size_of_dx = x.detach().double(), 0, 0
    for adapter, out, dout in zip(adapters, outs, douts, strict=True):
        W, A, B = (t.detach().double() for t in (adapter.base.dense_weight(), *_factors(adapter)))
        dY = dout.double()
        assert out.dtype == dtype
        size = X.abs() @ W.abs().T + scale * X.abs() @ A.abs().T @ B.abs().T
        check("out", out, X @ W.T + scale * X @ A.T @ B.T, size, 4, in_features + rank)
        for factor, exact, size in (
            (adapter.lora_A, scale * (dY @ B).T @ X, scale * (dY.abs() @ B.abs()).T @ X.abs()),
            (adapter.lora_B, scale * dY.T @ (X @ A.T), scale * dY.abs().T @ (X.abs() @ A.abs().T)),
        ):
            assert factor.weight.grad.dtype == factor.weight.dtype
            check("factor", factor.weight.grad, exact, size, 3, num_tokens + max(in_features, *out_features))
        dx = dx + dY @ W + scale * dY @ B @ A
        size_of_dx = size_of_dx + dY.abs() @ W.abs() + scale * dY.abs() @ B.abs() @ A.abs()
    assert x.grad.dtype == dtype
    roundings = max(2 * len(adapters) + 2, 5)
    check("dx", x.grad, dx, size_of_dx, roundings, sum(out_features) + len(adapters) * rank)


def _factors(adapter: LoraLinear) -> tuple[Tensor, Tensor]:
    return adapter.lora_A.weight, adapter.lora_B.weight
