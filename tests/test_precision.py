"""The policy's rules, and what its least forgiving choice, float16, asks of everything a training step runs.

Oracle for float16: the formula in fp64. Matrix products of fp16 are summed up in fp32 on every device, so with
u32 = 2^-24 a sum of K terms is off by (K + 2) u32 of the sum of absolute terms, and then rounded once: by half a unit
of fp16, 2^-11 of the value, or 2^-25 among the subnormals. (The compiled ops in all three dtypes are in tests/ops,
attention is in tests/model/test_blocked_attention.py.)
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import LossScaler
from minift.optim.shard import FlatShard, ParamRange
from minift.precision import Precision

U32, U16 = 2.0**-24, 2.0**-11
SMALLEST_HALF = 2.0**-25  # half of the smallest subnormal
WIRES = ["float32", "bfloat16", "float16"]


def test_default_is_fp32_masters_over_a_bf16_wire():
    precision = Precision()
    dtypes = (precision.master_dtype, precision.wire_dtype, precision.reduce_dtype)
    assert dtypes == (torch.float32, torch.bfloat16, torch.float32)
    assert not precision.stochastic_rounding


def test_every_format_has_a_dtype_property():
    precision = Precision(wire="float16", reduce="bfloat16", master="bfloat16", stochastic_rounding=True)
    dtypes = (precision.master_dtype, precision.wire_dtype, precision.reduce_dtype)
    assert dtypes == (torch.bfloat16, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("field, value", [("master", "float16"), ("wire", "bf16"), ("wire", "int8"), ("reduce", None)])
def test_an_invalid_name_is_refused_with_what_is_valid(field, value):
    with pytest.raises(ValueError, match=rf"precision\.{field} is {value!r}; valid: .*float32"):
        Precision(**{field: value})


def test_a_bf16_master_that_is_not_rounded_stochastically_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"precision\.master is 'bfloat16' without .* below 2\^-9 .* valid: float32"):
        Precision(master="bfloat16")


def test_stochastic_rounding_of_what_is_not_rounded_is_refused():
    with pytest.raises(ValueError, match=r"stochastic_rounding is true, but precision\.master is 'float32'"):
        Precision(stochastic_rounding=True)


@pytest.mark.parametrize("wire", WIRES)
def test_sums_in_fp16_need_the_loss_scaler_that_comes_with_an_fp16_wire(wire):
    assert Precision(wire=wire).needs_loss_scaling == (wire == "float16")
    if wire == "float16":
        Precision(wire=wire, reduce="float16")
    else:
        with pytest.raises(ValueError, match=rf"reduce is 'float16', but precision\.wire is '{wire}'.*wire float16"):
            Precision(wire=wire, reduce="float16")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_every_other_combination_is_accepted(wire, reduce):
    Precision(wire=wire, reduce=reduce)
    Precision(wire=wire, reduce=reduce, master="bfloat16", stochastic_rounding=True)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Precision().wire = "float32"


# ------------------------------------------------------------------------------------------------ float16: operations


def check_product(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """actual (fp16) is a @ b of fp16 matrices, to the bound of the module docstring."""
    a, b = a.detach().double(), b.detach().double()
    exact, terms = a @ b, a.abs() @ b.abs()
    assert actual.dtype == torch.float16
    error = (actual.detach().double() - exact).abs()
    assert (error <= (a.shape[-1] + 2) * U32 * terms + U16 * exact.abs() + SMALLEST_HALF).all()


@given(st.integers(1, 20), st.integers(1, 300), st.integers(1, 40), st.integers(0, 999))
def test_linear(rows, in_features, out_features, seed):
    torch.manual_seed(seed)
    layer = Linear(in_features, out_features).half()
    torch.nn.init.normal_(layer.weight)
    x, dy = torch.randn(rows, in_features).half().requires_grad_(), torch.randn(rows, out_features).half()
    y = layer(x)
    y.backward(dy)
    check_product(y, x, layer.weight.t())
    check_product(x.grad, dy, layer.weight)
    check_product(layer.weight.grad, dy.t(), x)


def test_embedding_sums_the_gradients_of_a_frequent_token_in_fp32():
    """2^15 times 1.5 ends at 49152. A running sum in fp16 stops at 4096, whose neighbour is 4 away: 1.5 is lost."""
    embedding = Embedding(3, 2).half()
    torch.nn.init.ones_(embedding.weight)
    embedding(torch.ones(2**15, dtype=torch.int64)).backward(torch.full((2**15, 2), 1.5).half())
    assert torch.equal(embedding.weight.grad, torch.tensor([[0.0] * 2, [49152.0] * 2, [0.0] * 2]).half())


@given(st.integers(1, 24), st.integers(1, 30), st.integers(0, 999))
def test_cross_entropy(rows, chunk_tokens, seed):
    """The loss in fp32 from fp16 logits; gradients from softmax - one_hot in fp16.

    A logit may be rounded to the other neighbour by a product of another shape: by U16 * 2 of the largest, which moves
    a probability by as much of itself at most (twice, for the sum below it).
    """
    torch.manual_seed(seed)
    vocab, dim = 11, 6
    head = Linear(dim, vocab).half()
    torch.nn.init.normal_(head.weight)
    hidden, targets = torch.randn(rows, dim).half().requires_grad_(), torch.randint(0, vocab, (rows,))
    loss = linear_cross_entropy(hidden, head, targets, chunk_tokens)
    loss.backward()

    logits = head(hidden).detach().double()
    ulp = 2 * U16 * logits.abs().max().item()
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    assert abs(loss.item() - expected) <= rows * (2 * ulp + 2**-20 * (10 + ulp))

    d_logits = logits.softmax(-1) - F.one_hot(targets, vocab)
    x, weight = hidden.detach().double(), head.weight.detach().double()
    off = (2 * ulp + U16) * logits.softmax(-1) + U16 * d_logits.abs() + SMALLEST_HALF  # of d_logits in fp16
    for actual, a, b, off_a in ((hidden.grad, d_logits, weight, off), (head.weight.grad, d_logits.t(), x, off.t())):
        exact = a @ b
        limit = off_a @ b.abs() + (a.shape[1] + 2) * U32 * (a.abs() @ b.abs()) + 2 * U16 * exact.abs() + SMALLEST_HALF
        assert actual.dtype == torch.float16 and ((actual.double() - exact).abs() <= 1.01 * limit).all()


def test_cross_entropy_of_a_frequent_token_does_not_overflow_before_the_loss_scale_applies():
    """2000 rows of one target add up to 100 000 in the weight's gradient; their mean, what is asked for, is 50."""
    head = Linear(4, 3).half()
    torch.nn.init.zeros_(head.weight)
    hidden = torch.full((2000, 4), 75.0).half()
    loss = linear_cross_entropy(hidden, head, torch.ones(2000, dtype=torch.int64))
    (loss / 2000).backward()
    expected = torch.tensor([[25.0] * 4, [-50.0] * 4, [25.0] * 4])
    assert ((head.weight.grad.float() - expected).abs() <= 2 * U16 * expected.abs()).all()


# -------------------------------------------------------------------------------------------------- float16: training

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.1, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
TOKENS = 48


def loss_of(model: CausalLM) -> Tensor:
    """Mean loss over three documents of random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, 40, (2, TOKENS), generator=generator)
    loss = model(
        tokens, torch.arange(16).repeat(3), torch.tensor([0, 16, 32, 48], dtype=torch.int32), 16,
        head=lambda hidden_TD, lm_head: linear_cross_entropy(hidden_TD, lm_head, targets),
    )  # fmt: skip
    return loss / TOKENS


def make_model(dtype: torch.dtype) -> CausalLM:
    model = CausalLM(ModelConfig.from_hf(TINY))
    model.init_weights(0)
    return model.to(dtype)


def test_gradients_of_a_model_under_a_loss_scale():
    """Of scaled fp16 against fp64, in norm. Between input and gradient lie about 20 roundings per layer, forward and
    backward, each of 2^-11 and independent of the others: 2^-11 * sqrt(2 layers * 20 * 2) = 0.0044; twice that."""
    exact, half = make_model(torch.float64), make_model(torch.float16)
    scale = 2.0**12
    loss_of(exact).backward()
    loss = loss_of(half)
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    for (name, expected), ours in zip(exact.named_parameters(), half.parameters(), strict=True):
        error = (ours.grad.double() / scale - expected.grad).norm() / expected.grad.norm()
        assert ours.grad.dtype == torch.float16 and error < 0.009, name


@pytest.mark.parametrize("precision", [
    Precision(wire="float16"),
    Precision(wire="float16", master="bfloat16", stochastic_rounding=True),
])  # fmt: skip
def test_trains_from_a_scale_that_overflows(precision):
    """One process's step, written out: gather, forward, scaled backward, reduce, update. First steps are skipped."""
    model = make_model(torch.float32)
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    master = torch.cat([p.detach().flatten() for p in params]).to(precision.master_dtype)
    ranges, start = [], 0
    for (name, p), size in zip(model.named_parameters(), sizes, strict=True):
        ranges.append(ParamRange(name, start, start + size, 0, tuple(p.shape)))
        start += size
    shard = FlatShard("all", master, torch.zeros(master.numel()), ranges)
    optimizer, scaler = AdamW([shard], OptimConfig(lr=1e-2)), LossScaler(2.0**28, growth_interval=5)
    model.to(precision.wire_dtype)

    losses, num_skipped = [], 0
    for _ in range(40):
        with torch.no_grad():
            for p, piece in zip(params, shard.master.split(sizes), strict=True):
                p.copy_(piece.view(p.shape))
        loss = loss_of(model)
        (loss * scaler.scale).backward()
        shard.grad.copy_(torch.cat([p.grad.flatten() for p in params]))
        model.zero_grad()
        overflowed = not shard.grad.norm().isfinite()
        if overflowed:
            num_skipped += 1
        else:
            optimizer.step(1.0, grad_factor=1.0 / scaler.scale)
        scaler.update(bool(overflowed))
        losses.append(loss.item())
    assert 1 <= num_skipped <= 25 and optimizer.num_steps == 40 - num_skipped
    assert losses[0] > 3 and losses[-1] < 0.8 * losses[0]
    assert shard.master.isfinite().all()
