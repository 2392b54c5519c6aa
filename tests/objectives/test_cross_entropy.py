"""Oracle: torch's cross entropy over the full logits, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minift.data import batch
from minift.grad_slot import GradSlot, lay_slot, slot_of
from minift.model.linear import Linear
from minift.objectives.cross_entropy import IGNORE, default_chunk_tokens, linear_cross_entropy
from minift.ops import cross_entropy

D, V = 6, 11


class LowRankHead(nn.Module):
    """What LoRA makes of a head: a frozen dense one, and a trained product beside it."""

    def __init__(self):
        super().__init__()
        self.base = Linear(D, V)
        self.A, self.B = nn.Parameter(torch.empty(2, D)), nn.Parameter(torch.empty(V, 2))
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + x @ self.A.t() @ self.B.t()


class CappedHead(nn.Module):
    """Its last operation saves its result for backward, and two of its parameters get the very same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.A, self.B, self.unused = (nn.Parameter(torch.empty(V, D)) for _ in range(3))

    def forward(self, x):
        return torch.tanh(x @ (self.A + self.B).t())


class SquashedHead(Linear):
    """Owns one weight, as a dense head does, and is none."""

    def __init__(self):
        super().__init__(D, V)
        self.activation = nn.Tanh()

    def forward(self, x):
        return self.activation(super().forward(x))


HEADS = {
    "frozen": lambda: Linear(D, V).requires_grad_(False),
    "trained": lambda: Linear(D, V),
    "frozen bias": lambda: Linear(D, V, bias=True).requires_grad_(False),
    "trained bias": lambda: Linear(D, V, bias=True),
    "only bias": lambda: bias_only_head(),
    "torch": lambda: nn.Linear(D, V),
    "low rank": LowRankHead,
    "capped": CappedHead,
    "squashed": SquashedHead,
}


def bias_only_head():
    head = Linear(D, V, bias=True)
    head.weight.requires_grad_(False)
    return head


def make(kind, dtype, num_rows, seed, supervised=0.6):
    """(hidden, head, targets) with hidden an activation that needs its gradient."""
    torch.manual_seed(seed)
    head = HEADS[kind]().to(dtype)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    hidden_ND = torch.randn(num_rows, D, dtype=dtype, requires_grad=True)
    targets_N = torch.randint(0, V, (num_rows,)).where(torch.rand(num_rows) < supervised, IGNORE)
    return hidden_ND, head, targets_N


def gradients(loss, hidden, head, divisor=7):
    """Of loss / divisor, for hidden and every parameter that is trained; None where there is none."""
    hidden.grad = None
    head.zero_grad(set_to_none=True)
    (loss / divisor).backward()
    return [hidden.grad, *(parameter.grad for parameter in head.parameters() if parameter.requires_grad)]


class Record(TorchDispatchMode):
    """GEMMs run and elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.num_gemms, self.largest = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.num_gemms += op._schema.name.split("::")[1] in ("mm", "addmm", "addmm_", "bmm")
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


kinds = st.sampled_from(sorted(HEADS))
cases = {"kind": kinds, "num_rows": st.integers(1, 24), "chunk": st.integers(1, 30), "seed": st.integers(0, 2**31)}


@given(**cases, supervised=st.sampled_from([0.0, 0.3, 1.0]), softmax_rows=st.integers(0, 5))
def test_value_and_gradients_are_those_of_the_full_logits(kind, num_rows, chunk, seed, supervised, softmax_rows):
    hidden, head, targets = make(kind, torch.float64, num_rows, seed, supervised)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy.WIDE_BYTES, "cpu", softmax_rows * V * 8)
        loss = linear_cross_entropy(hidden, head, targets, chunk)
    ours = gradients(loss, hidden, head)
    full = F.cross_entropy(head(hidden), targets, reduction="sum")
    theirs = gradients(full, hidden, head)
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(ours, theirs, strict=True):
        reference = torch.zeros_like(mine) if reference is None else reference  # a parameter that is not used
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@given(**{**cases, "kind": st.sampled_from(["frozen", "trained", "trained bias"])})
def test_bf16_rounds_logits_their_gradient_and_the_results_and_nothing_else(kind, num_rows, chunk, seed):
    hidden, head, targets = make(kind, torch.bfloat16, num_rows, seed)
    loss = linear_cross_entropy(hidden, head, targets, chunk)
    d_hidden, *d_trained = gradients(loss, hidden, head, divisor=1)
    assert loss.dtype == torch.float32 and {d_hidden.dtype, *(d.dtype for d in d_trained)} == {torch.bfloat16}

    # fp64 from the bf16 logits on. A GEMM of another number of rows may round a logit to the other neighbour: by `ulp`.
    rows = targets != IGNORE
    logits, inputs, weight = (t.detach().double() for t in (head(hidden)[rows], hidden[rows], head.weight))
    ulp = 2**-7 * logits.abs().max() if rows.any() else 0.0
    reference = F.cross_entropy(logits, targets[rows], reduction="sum")
    assert abs(loss.item() - reference) <= rows.sum() * (2 * ulp + 2**-20 * (10 + ulp))
    softmax = logits.softmax(1)
    d_logits = softmax - F.one_hot(targets[rows], V)
    error = 2**-8 * d_logits.abs() + 2 * ulp * softmax  # bf16; softmax moves by twice a logit's error
    d_inputs = d_logits @ weight
    assert ((d_hidden[rows].double() - d_inputs).abs() <= error @ weight.abs() + 2**-8 * d_inputs.abs() + 1e-6).all()
    assert not d_hidden[~rows].any()
    if kind != "frozen":  # each chunk's product is rounded, their sum is fp32
        d_weight = d_logits.t() @ inputs
        bound = error.t() @ inputs.abs() + 2**-8 * (d_logits.abs().t() @ inputs.abs()) + 2**-8 * d_weight.abs() + 1e-6
        assert ((d_trained[0].double() - d_weight).abs() <= bound).all()


@given(**cases)
def test_the_chunk_size_matters_only_to_fp32_rounding(kind, num_rows, chunk, seed):
    hidden, head, targets = make(kind, torch.float32, num_rows, seed)
    whole = linear_cross_entropy(hidden, head, targets, num_rows)
    chunked = linear_cross_entropy(hidden, head, targets, chunk)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    expected = gradients(whole, hidden, head)
    for mine, reference in zip(gradients(chunked, hidden, head), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@given(
    kind=st.sampled_from(["trained", "trained bias"]), num_rows=st.integers(1, 24), chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_gradients_are_made_in_slots_of_fp32(num_rows, chunk, seed, dtype, kind):
    """Of several chunks or of one, and not rounded to 16 bits. Autograd gets what comes to a slot that is full."""
    hidden, head, targets = make(kind, dtype, num_rows, seed)
    expected = gradients(linear_cross_entropy(hidden, head, targets, chunk), hidden, head)
    for parameter in head.parameters():
        lay_slot(parameter, GradSlot(torch.full(parameter.shape, torch.nan)))
    loss = linear_cross_entropy(hidden, head, targets, chunk)
    assert {slot_of(parameter).state for parameter in head.parameters()} == {GradSlot.State.CLAIMED}
    assert gradients(loss, hidden, head)[1:] == [None for _ in head.parameters()]
    for parameter, gradient in zip(head.parameters(), expected[1:], strict=True):
        error = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(slot_of(parameter).tensor, gradient.float(), rtol=error, atol=error)
    second = gradients(linear_cross_entropy(hidden, head, targets, chunk), hidden, head)
    for mine, reference in zip(second, expected, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("kind, gemms_per_chunk", [("frozen", 2), ("frozen bias", 2), ("trained", 3), ("only bias", 2)])
def test_gemms_and_largest_tensor(kind, gemms_per_chunk):
    num_rows, chunk = 64, 8
    hidden, head, targets = make(kind, torch.float32, num_rows, 0, supervised=1.0)
    with Record() as record:
        linear_cross_entropy(hidden, head, targets, chunk).backward()
    assert record.num_gemms == gemms_per_chunk * num_rows // chunk
    assert record.largest == max(chunk * V, num_rows * D)


@pytest.mark.parametrize("kind", ["trained bias", "low rank"])
def test_evaluation_computes_no_gradient(kind):
    hidden, head, targets = make(kind, torch.float32, 16, 0, supervised=1.0)
    trained = linear_cross_entropy(hidden, head, targets, 4)
    with torch.no_grad(), Record() as record:
        evaluated = linear_cross_entropy(hidden, head, targets, 4)
    assert not evaluated.requires_grad and torch.equal(evaluated, trained)
    assert record.num_gemms == 4 * (3 if kind == "low rank" else 1)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_weights_are_not_read_in_backward_and_hooks_fire_once(kind):
    """FSDP gives the memory of a weight to another unit after its forward, and waits for hooks on gradients."""
    hidden, head, targets = make(kind, torch.float32, 12, 0)
    fired = []
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    expected = gradients(linear_cross_entropy(hidden, head, targets, 5), hidden, head)
    fired.clear()
    loss = linear_cross_entropy(hidden, head, targets, 5)
    for parameter in head.parameters():
        parameter.data.fill_(float("nan"))
    for mine, reference in zip(gradients(loss, hidden, head), expected, strict=True):
        assert torch.equal(mine, reference)
    assert sorted(fired) == sorted(name for name, p in head.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_nothing_supervised_still_reaches_everything(kind):
    hidden, head, targets = make(kind, torch.float32, 3, 0, supervised=0.0)
    loss = linear_cross_entropy(hidden, head, targets, 4)
    assert loss.item() == 0.0
    for gradient in gradients(loss, hidden, head):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_tied_embedding_gets_both_gradients():
    hidden, head, targets = make("trained", torch.float64, 12, 0)
    tokens = torch.randint(0, V, (12,))
    ours = gradients(linear_cross_entropy(head.weight[tokens].tanh(), head, targets, 5), hidden, head)
    theirs = gradients(F.cross_entropy(head(head.weight[tokens].tanh()), targets, reduction="sum"), hidden, head)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-11)


def test_the_incoming_factor_is_not_rounded_to_bf16():
    hidden, head, targets = make("trained", torch.bfloat16, 12, 0)
    unscaled = gradients(linear_cross_entropy(hidden, head, targets), hidden, head, divisor=1)
    scaled = gradients(linear_cross_entropy(hidden, head, targets), hidden, head, divisor=1003)
    factor = torch.tensor(1.0) / 1003
    assert factor.bfloat16().float() != factor
    for mine, reference in zip(scaled, unscaled, strict=True):
        assert torch.equal(mine, (reference.float() * factor).bfloat16())


def test_large_logits_do_not_overflow():
    hidden, head, targets = make("trained", torch.float32, 12, 0)
    with torch.no_grad():
        head.weight.mul_(1e4)
    loss = linear_cross_entropy(hidden, head, targets)
    full = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, full)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, head))


@pytest.mark.parametrize("kind", ["trained bias", "low rank"])
def test_chunks_are_added_up_in_fp32(kind):
    """1024 equal terms: a bf16 sum stops growing at 256 times a term."""
    _, head, _ = make(kind, torch.bfloat16, 1, 0)
    hidden = torch.ones(1024, D, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    _, *one = gradients(linear_cross_entropy(hidden[:1], head, targets[:1], 1), hidden, head, divisor=1)
    _, *many = gradients(linear_cross_entropy(hidden, head, targets, 1), hidden, head, divisor=1)
    for single, total in zip(one, many, strict=True):
        torch.testing.assert_close(total, single * 1024, rtol=2**-8, atol=0)


@pytest.mark.parametrize("supervised", [0.0, 0.5, 1.0])
def test_whether_the_host_knows_the_number_of_targets_does_not_matter(supervised):
    """The same rows in the same order, so the same bits."""
    hidden, head, targets = make("frozen", torch.float32, 23, 5, supervised)
    found = []
    for num_targets in (None, int((targets != IGNORE).sum())):
        loss = linear_cross_entropy(hidden, head, targets, 4, num_targets)
        found.append((loss, *torch.autograd.grad(loss, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_default_chunk_is_a_byte_budget_with_a_floor():
    assert default_chunk_tokens(32_768, 2, is_on_gpu=False, is_trained=True) == 4096
    assert default_chunk_tokens(32_768, 2, is_on_gpu=False, is_trained=False) == 384
    assert default_chunk_tokens(32_768, 2, is_on_gpu=True, is_trained=False) == 4096
    assert default_chunk_tokens(32_768, 2, is_on_gpu=True, is_trained=True) == 8192
    assert default_chunk_tokens(32_768, 2, is_on_gpu=True, is_trained=True, is_dense=False) == 4096
    assert default_chunk_tokens(1_000_000, 4, is_on_gpu=True, is_trained=False) == 1024
    assert default_chunk_tokens(1_000_000, 4, is_on_gpu=False, is_trained=False) == 256


def test_ignore_is_what_batches_use():
    assert IGNORE == batch.IGNORE
