"""`project` and `Linear`, and what else stores a weight. Oracle: torch's own autograd of `F.linear`, and of the dense
formula with updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.grad_slot import GradSlot, lay_slot
from minift.model import project as project_module
from minift.model.linear import Linear, LinearBase
from minift.model.low_rank import LowRank
from minift.model.project import project, project_gated, project_to_gate
from minift.ops import extension
from minift.ops.swiglu import swiglu
from minift.planner.meter import TensorMeter
from minift.quant.linear import NF4Linear
from tests.cuda_on_cpu import library as cuda_on_cpu
from tests.cuda_on_cpu.library import guarded
from tests.ops.elsewhere import kernels_replaced, on_copies

# Sums of at most 32 + 12 products of factors of size 1 and a scale of 8, in another order: 44 · 1.1e-16 · 8 · 12 · 32.
FP64 = {"rtol": 1e-12, "atol": 1e-11}


class Rounded(LinearBase):
    """A base that stores no dense weight: integers and a scale. All that a quantized projection has to write."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.register_buffer("codes", torch.randint(-8, 8, (out_features, in_features)))

    def dense_weight(self) -> Tensor:
        return self.codes.double() / 8

    def product(self, x_NI: Tensor, add_to_NO: Tensor | None = None) -> Tensor:
        out_NO = x_NI @ self.dense_weight().t()
        return out_NO if add_to_NO is None else add_to_NO.add_(out_NO)

    def product_dx(self, dy_NO: Tensor, add_to_NI: Tensor | None = None) -> Tensor:
        dx_NI = dy_NO @ self.dense_weight()
        return dx_NI if add_to_NI is None else add_to_NI.add_(dx_NI)


class Updated(LinearBase):
    """A projection with a low-rank update."""

    def __init__(self, base: LinearBase, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base, self.scale = base.in_features, base.out_features, base, scale
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.empty(base.out_features, rank))

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        base, updates = self.base.parts()
        return base, (*updates, LowRank(self.A, self.B, self.scale, self.dropout))


class Squared(LinearBase):
    """A projection whose output is a function, which backward reads, of the sum of its parts."""

    def __init__(self, base: LinearBase) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base = base.in_features, base.out_features, base

    def parts(self) -> tuple[LinearBase, tuple[LowRank, ...]]:
        return self.base.parts()

    def after(self, out_NO: Tensor) -> Tensor:
        return out_NO.square()


class Opaque(nn.Module):
    """A projection that is only a forward."""

    def __init__(self, inner: LinearBase) -> None:
        super().__init__()
        self.inner = inner

    def parts(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass(frozen=True)
class Spec:
    """One projection: how its weight is stored, and which of its parameters are trained."""

    out_features: int
    kind: str
    has_bias: bool
    trained: tuple[bool, bool, bool, bool]  # W, b, A, B
    ranks: tuple[int, ...]  # of the updates
    scale: float
    block_size: int = 64  # of NF4
    double_quant: bool = True


specs = st.builds(
    Spec,
    out_features=st.integers(1, 9),
    kind=st.sampled_from(["dense", "dense", "rounded", "opaque", "nf4"]),
    block_size=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    has_bias=st.booleans(),
    trained=st.tuples(*[st.booleans()] * 4),
    ranks=st.sampled_from([(), (1,), (2,), (5,), (12,), (2, 3), (1, 4, 2)]),
    scale=st.floats(0.1, 8.0),
)


def make(spec: Spec, in_features: int) -> LinearBase:
    if spec.kind == "rounded":
        projection: LinearBase = Rounded(in_features, spec.out_features)
    elif spec.kind == "nf4":
        kind = (spec.has_bias, spec.block_size, spec.double_quant, torch.float64, torch.device("cpu"))
        weight = torch.randn(spec.out_features, in_features)
        projection = NF4Linear(in_features, spec.out_features, *kind).storing(weight)
        if spec.has_bias:
            projection.bias.requires_grad_(spec.trained[1])
    else:
        projection = Linear(in_features, spec.out_features, spec.has_bias)
        projection.weight.requires_grad_(spec.trained[0])
        if spec.has_bias:
            projection.bias.requires_grad_(spec.trained[1])
    for rank in spec.ranks:
        projection = Updated(projection, rank, spec.scale)
        projection.A.requires_grad_(spec.trained[2])
        projection.B.requires_grad_(spec.trained[3])
    projection.double()
    for parameter in projection.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter)
    return projection


def expected(x: Tensor, projection: LinearBase) -> Tensor:
    """Autograd through one dense matrix."""
    base, updates = projection.parts()
    weight = base.weight if isinstance(base, Linear) else base.dense_weight()
    for update in updates:
        weight = weight + update.scale * update.B @ update.A
    return F.linear(x, weight, base.bias)


def gradients(
    outs: Sequence[Tensor], douts: Sequence[Tensor], x: Tensor, projections: Sequence[nn.Module]
) -> list[Tensor | None]:
    """Of x and all parameters, None for those without."""
    leaves = [x, *(parameter for projection in projections for parameter in projection.parameters())]
    pairs = [(out, dout) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


@settings(max_examples=150)
@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    in_features=st.one_of(st.integers(1, 9), st.just(32)),  # 32: a row is a block of NF4, or half of one
    all_specs=st.lists(specs, min_size=1, max_size=4),
    x_needs_grad=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "every second", "expanded gradients"]),
    seed=st.integers(0, 2**31),
)
def test_values_and_every_gradient(leading, in_features, all_specs, x_needs_grad, layout, seed):
    torch.manual_seed(seed)
    projections = [make(spec, in_features) for spec in all_specs]
    shown = [Opaque(p) if spec.kind == "opaque" else p for p, spec in zip(projections, all_specs, strict=True)]
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    if layout == "transposed":
        x = torch.randn(in_features, *leading, dtype=torch.float64).movedim(0, -1)
    elif layout == "every second":
        x = torch.randn(*leading, 2 * in_features, dtype=torch.float64)[..., ::2]
    x.requires_grad_(x_needs_grad)
    douts = [torch.randn(*leading, p.out_features, dtype=torch.float64) for p in projections]
    if layout == "expanded gradients":
        douts = [torch.randn((), dtype=torch.float64).expand_as(dout) for dout in douts]

    outs = project(x, *shown)
    exact = [expected(x, projection) for projection in projections]
    torch.testing.assert_close(outs, exact, **FP64)
    assert [out.requires_grad for out in outs] == [out.requires_grad for out in exact] or not x_needs_grad
    ours, theirs = (gradients(all_outs, douts, x, projections) for all_outs in (outs, exact))
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        assert (our_gradient is None) == (their_gradient is None)
        if our_gradient is not None:
            torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-10)
    for projection in projections:
        torch.testing.assert_close(projection(x), expected(x, projection), **FP64)


@given(
    num_tokens=st.integers(1, 5),
    in_features=st.one_of(st.integers(1, 9), st.just(32)),
    spec=specs.filter(lambda spec: spec.kind != "opaque"),
    needs_grad=st.sampled_from([(True, True), (False, False), (True, False), (False, True)]),
    keeps_product=st.booleans(),
    result_is_read=st.booleans(),
    has_after=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_projection_of_silu_gate_times_up(
    num_tokens, in_features, spec, needs_grad, keeps_product, result_is_read, has_after, seed
):
    """The same bits as by two operations, with a second backward over the same graph, and also where the result is left
    out: nothing that is asked for is made of it."""
    torch.manual_seed(seed)
    projection = make(spec, in_features)
    if has_after:
        projection = Squared(projection)
    gate_up = [torch.randn(num_tokens, in_features, dtype=torch.float64).requires_grad_(needs) for needs in needs_grad]
    dout = torch.randn(num_tokens, projection.out_features, dtype=torch.float64)
    expected = projection(swiglu(*gate_up))
    out = project_gated(*gate_up, projection, keeps_product, result_is_read)
    assert out.shape == expected.shape and out.requires_grad == expected.requires_grad
    if result_is_read or has_after:
        assert torch.equal(out, expected)
    if not expected.requires_grad:
        return
    leaves = [leaf for leaf in (*gate_up, *projection.parameters()) if leaf.requires_grad]
    wanted = torch.autograd.grad(expected, leaves, dout)
    for retain_graph in (True, False):
        before = [tensor.clone() for tensor in gate_up]
        found = torch.autograd.grad(out, leaves, dout, retain_graph=retain_graph)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, gate_up, strict=True))


@given(
    num_tokens=st.integers(1, 5),
    in_features=st.integers(1, 9),
    width=st.one_of(st.integers(1, 9), st.just(32)),
    three_specs=st.tuples(*[specs.filter(lambda spec: spec.kind != "opaque")] * 3),
    dropouts=st.tuples(*[st.sampled_from([0.0, 0.0, 0.5])] * 3),
    x_needs_grad=st.booleans(),
    keeps_product=st.booleans(),
    result_is_read=st.booleans(),
    has_after=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_updates_that_silu_gate_times_up_makes(
    num_tokens, in_features, width, three_specs, dropouts, x_needs_grad, keeps_product, result_is_read, has_after, seed
):
    """The values and gradients of projections that make theirs themselves, dropout's zeros included, with a second
    backward over the same graph. On a GPU a kernel does this; here its reference."""
    torch.manual_seed(seed)
    gate, up = (make(replace(spec, out_features=width), in_features) for spec in three_specs[:2])
    down = make(three_specs[2], width)
    for projection, dropout in zip((gate, up, down), dropouts, strict=True):
        for module in projection.modules():
            if isinstance(module, Updated):
                module.dropout = dropout
    shown = Squared(down) if has_after else down
    x = torch.randn(num_tokens, in_features, dtype=torch.float64, requires_grad=x_needs_grad)
    dout = torch.randn(num_tokens, down.out_features, dtype=torch.float64)
    leaves = [leaf for leaf in (x, *gate.parameters(), *up.parameters(), *down.parameters()) if leaf.requires_grad]

    def run(makes_updates: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(project_module, "makes_updates", lambda *_: makes_updates)
            gate_NI, up_NI, pending = project_to_gate(x, gate, up)
            assert (pending is not None) == (makes_updates and bool(three_specs[0].ranks or three_specs[1].ranks))
            out = project_gated(gate_NI, up_NI, shown, keeps_product, result_is_read, pending)
            found: list[Tensor] = []
            for retain_graph in (True, False) if out.requires_grad else ():
                found += torch.autograd.grad(out, leaves, dout, retain_graph=retain_graph, allow_unused=True)
        return out, found

    (expected_out, expected_gradients), (out, found) = run(False), run(True)
    if result_is_read or has_after:
        torch.testing.assert_close(out, expected_out, rtol=1e-10, atol=1e-8)
    for ours, theirs in zip(found, expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-8 * (1 + float(theirs.abs().max())))


HAS_KERNELS = cuda_on_cpu.compiler() is not None and extension.MISSING_REASON is None


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the extension and a compiler")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("num_tokens", [1, 129])
@pytest.mark.parametrize("is_nf4", [False, True])
def test_the_kernel_in_its_place_is_as_exact_as_updates_made_before(is_nf4, num_tokens, dropout):
    """In bf16, with fp32 factors, against fp64: narrow matrices are columns of one, factors as they lie."""
    torch.manual_seed(num_tokens)
    spec = Spec(192, "nf4" if is_nf4 else "dense", False, (False, False, True, True), (16,), 2.0)
    gate, up, down = make(spec, 64), make(spec, 64), make(replace(spec, out_features=64), 192)
    for projection in (gate, up, down):
        projection.dropout = dropout
        for parameter in projection.parameters():
            if parameter.is_floating_point():
                parameter.data.mul_(0.1).copy_(parameter.data.bfloat16())
    leaves = [factor for projection in (gate, up, down) for factor in (projection.A, projection.B)]
    x = torch.randn(num_tokens, 64).bfloat16().double().requires_grad_()
    dout = torch.randn(num_tokens, 64).bfloat16().double()

    def run(dtype: torch.dtype, makes_updates: bool) -> list[Tensor]:
        for projection in (gate, up, down):
            projection.base.to(dtype)
            for factor in (projection.A, projection.B):
                factor.data = factor.data.to(torch.promote_types(dtype, torch.float32))
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            real = project_module.makes_updates
            patch.setattr(project_module, "makes_updates", lambda *a: makes_updates and real(*a[:3], is_on_gpu=True))
            gate_NI, up_NI, pending = project_to_gate(x.to(dtype), gate, up)
            assert (pending is not None) == makes_updates
            out = project_gated(gate_NI, up_NI, down, False, True, pending)
            return [out, *torch.autograd.grad(out, [x, *leaves], dout.to(dtype))]

    exact = run(torch.float64, False)
    before = run(torch.bfloat16, False)
    names = cuda_on_cpu.op_names()
    with kernels_replaced(names, lambda name: on_copies(cuda_on_cpu.op(name), guarded, guarded)):
        found = run(torch.bfloat16, True)
    for ours, theirs, wanted in zip(found, before, exact, strict=True):
        error, allowed = ((tensor.double() - wanted).abs().max() for tensor in (ours, theirs))
        assert error <= 2 * allowed + 2**-8 * wanted.abs().max()


def test_updates_are_not_left_out_of_what_a_function_follows(monkeypatch):
    monkeypatch.setattr(project_module, "makes_updates", lambda *_: True)
    gate, up = (make(Spec(8, "dense", False, (True,) * 4, (2,), 1.0), 4) for _ in range(2))
    x = torch.randn(3, 4, dtype=torch.float64)
    for pair in ((Squared(gate), up), (gate, Squared(up)), (Opaque(gate), up)):
        gate_NO, up_NO, pending = project_to_gate(x, *pair)
        assert pending is None
        assert torch.equal(gate_NO, pair[0](x)) and torch.equal(up_NO, pair[1](x))


def test_what_a_projection_of_silu_gate_times_up_has_in_memory():
    """Kept: gate and up, and the product if asked for. In backward: no more than four tensors of that width at a time,
    where autograd's own chain has five; and the product where it is made again."""
    shape, num_bytes = (400, 500), 400 * 500 * 4
    projection = Updated(Linear(500, 3), 1, 1.0)
    for parameter in projection.parameters():
        nn.init.normal_(parameter)
    for keeps_product in (True, False):
        gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
        with TensorMeter() as meter:
            out = project_gated(gate * 1, up * 1, projection, keeps_product, True)
            kept = meter.now_bytes / num_bytes
            assert (3 if keeps_product else 2) <= kept < (3.1 if keeps_product else 2.1)
            meter.peak_bytes = meter.now_bytes
            out.sum().backward()
        assert 0 <= meter.peak_bytes / num_bytes - (4 if keeps_product else 5) < 0.1


@pytest.mark.parametrize("slot_dtype", [torch.float64, torch.float32])
def test_gradients_go_into_slots(slot_dtype):
    """All of them with a slot and none to autograd; a second backward is added to the first."""
    torch.manual_seed(0)
    projections = [make(Spec(5, "dense", False, (True,) * 4, ranks, 0.7), 6) for ranks in ((3,), (2, 1))]
    projections.append(make(Spec(4, "dense", False, (True,) * 4, (), 1.0), 6))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    douts = [torch.randn(7, p.out_features, dtype=torch.float64) for p in projections]
    parameters = [parameter for projection in projections for parameter in projection.parameters()]
    _, *exact = gradients([expected(x, p) for p in projections], douts, x, projections)
    for parameter in parameters:
        lay_slot(parameter, GradSlot(torch.full(parameter.shape, torch.nan, dtype=slot_dtype)))
    for count in (1, 2):
        assert gradients(project(x, *projections), douts, x, projections)[1:] == [None] * len(parameters)
        for parameter, gradient in zip(parameters, exact, strict=True):
            slot = parameter.grad_slot
            assert slot.state is GradSlot.State.FULL
            tolerance = (
                1e-12 if slot_dtype == torch.float64 else 1e-5
            )  # two roundings of 6e-8, of terms that may cancel
            torch.testing.assert_close(slot.tensor.double(), count * gradient, rtol=tolerance, atol=tolerance)


def saved_by(run: Callable[[], object]) -> list[tuple[int, ...]]:
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        run()
    return saved


@pytest.mark.parametrize("trained", [False, True])
def test_the_input_is_saved_only_for_a_trained_weight_and_the_weight_never(trained):
    layer = Linear(3, 5, bias=True)
    layer.weight.requires_grad_(trained)
    x = torch.randn(7, 3, requires_grad=True)
    assert saved_by(lambda: layer(x)) == ([(7, 3)] if trained else [])


def test_projections_of_one_input_save_it_once_and_their_narrow_products():
    projections = [make(Spec(5, "dense", False, (False, False, True, True), (rank,), 1.0), 3) for rank in (2, 4)]
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert sorted(saved_by(lambda: project(x, *projections))) == [(7, 3), (7, 6)]
    for projection in projections:
        projection.B.requires_grad_(False)
    assert saved_by(lambda: project(x, *projections)) == [(7, 3)], "only B's gradient is made of the narrow products"


def test_x_itself_is_saved():
    layer, x, saved = Linear(3, 5), torch.randn(7, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        layer(x)
    assert [tensor is x for tensor in saved] == [True]


def test_backward_reads_weights_as_they_are_then():
    """What FSDP does: between forward and backward the weights move to other storage and the old one is overwritten."""
    torch.manual_seed(0)
    projections = [make(Spec(4, "dense", False, (True,) * 4, (2,), 0.5), 6) for _ in range(3)]
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    douts = [torch.randn(8, 4, dtype=torch.float64) for _ in projections]
    still = gradients(project(x, *projections), douts, x, projections)
    outs = project(x, *projections)
    for projection in projections:
        for parameter in projection.parameters():
            old, parameter.data = parameter.data, parameter.data.clone()
            old.fill_(torch.nan)
    for before, after in zip(still, gradients(outs, douts, x, projections), strict=True):
        assert torch.equal(before, after)


def test_gradients_have_the_weights_dtype():
    layer = Linear(4, 3, bias=True).bfloat16()
    layer(torch.randn(5, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.bfloat16


def test_nothing_is_recorded_when_nothing_is_trained():
    layer = Linear(4, 3).requires_grad_(False)
    assert layer(torch.randn(2, 4)).grad_fn is None


def test_linear_base_protocol():
    layer = Linear(4, 3, bias=True)
    assert (layer.in_features, layer.out_features) == (4, 3)
    assert layer.dense_weight().data_ptr() == layer.weight.data_ptr()
    assert not layer.dense_weight().requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in Linear(4, 3).named_parameters()] == ["weight"]
