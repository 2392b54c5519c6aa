"""swiglu and its gradients against the formula in fp64.

Tolerances, with u32 = 2^-24: silu is within 2.5 units in the last place (5 u32), as torch's own is; each product adds
u32, and the final rounding what conftest.py's `rounding` says.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import swiglu as module
from minift.ops.swiglu import swiglu

HAS_CUDA_KERNELS = True
U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "slice of wider rows", "every second row", "slice of a fused projection", "transposed"]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    st.tuples(st.integers(1, 3), st.integers(100, 700).map(lambda packs: 8 * packs)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
)
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    shape=SHAPES,
    layout=st.sampled_from(LAYOUTS),
    dy_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_the_formula(
    implementation, draw_tensor, rounding, dtype, shape, layout, dy_layout, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    gate = draw_tensor(generator, shape, dtype, layout).mul_(scale)
    up, dy = draw_tensor(generator, shape, dtype, layout), draw_tensor(generator, shape, dtype, dy_layout)
    if implementation == "reference":
        y = module.swiglu_reference(gate, up)
        dgate, dup = module.swiglu_backward_reference(dy, gate, up)
    else:
        gate.requires_grad_()
        up.requires_grad_()
        y = swiglu(gate, up)
        dgate, dup = torch.autograd.grad(y, (gate, up), dy)
        y = y.detach()
    assert y.dtype == dgate.dtype == dup.dtype == dtype

    g, u, d = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_(), dy.double()
    exact = torch.nn.functional.silu(g) * u
    exact_dgate, exact_dup = torch.autograd.grad(exact, (g, u), d)
    exact, g, u = exact.detach(), g.detach(), u.detach()
    assert ((y.double() - exact).abs() <= 7 * U32 * exact.abs() + 1.01 * rounding(exact, dtype)).all()
    assert ((dup.double() - exact_dup).abs() <= 7 * U32 * exact_dup.abs() + 1.01 * rounding(exact_dup, dtype)).all()
    # dgate is a sum of two terms that may cancel, so its fp32 error is relative to the terms.
    sigmoid = torch.sigmoid(g)
    terms = (d * u).abs() * sigmoid * (1 + g.abs() * (1 - sigmoid))
    assert ((dgate.double() - exact_dgate).abs() <= 12 * U32 * terms + 1.01 * rounding(exact_dgate, dtype)).all()


def test_silu_over_the_whole_range_of_fp32(instruction_set):
    """Every 8191st bit pattern: within 2.5 units in the last place, and non-finite exactly where torch is.

    Where e^-g overflows (g below -88.7) silu is zero, as torch's is; the exact value is below 1e-36 there.
    """
    gate = torch.arange(-(2**31), 2**31, 8191).to(torch.int32).view(torch.float32)
    y, torch_y = swiglu(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate)
    assert torch.equal(y.isnan(), torch_y.isnan()) and torch.equal(y.isinf(), torch_y.isinf())
    exact = torch.nn.functional.silu(gate.double())
    normal = gate.isfinite() & (exact.abs() >= torch.finfo(torch.float32).tiny) & (gate > -88)
    unit_in_last_place = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 24)
    assert ((y.double() - exact).abs() / unit_in_last_place)[normal].max() <= 2.5
    rest = gate.isfinite() & ~normal
    assert (y.double() - exact)[rest].abs().max() <= 1e-36


def test_gradients_far_from_zero(implementation):
    gate = torch.tensor([-1e30, -1e4, -100.0, -89.0, 89.0, 100.0, 1e4, 1e30])
    backward = module.swiglu_backward_reference if implementation == "reference" else module._swiglu_backward
    dgate, dup = backward(torch.ones(8), gate, torch.ones(8))
    torch.testing.assert_close(dgate, torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]), rtol=1e-6, atol=1e-35)
    torch.testing.assert_close(dup, gate.clamp(min=0), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@property_test
@given(shape=SHAPES, layout=st.sampled_from(LAYOUTS), need_y=st.booleans(), seed=st.integers(0, 999))
def test_in_place_the_gradients_are_the_same_bits(implementation, draw_tensor, dtype, shape, layout, need_y, seed):
    """And y is, if it is made again."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (draw_tensor(generator, shape, dtype, layout) for _ in range(2))
    dy = torch.randn(shape, generator=generator).to(dtype)
    if implementation == "reference":
        expected = module.swiglu_backward_reference(dy, gate, up)
        dgate, (dup, y) = dy, module.swiglu_backward_in_place_reference(dy, gate, up, need_y)
    else:
        expected = module.swiglu_backward(dy, gate, up)
        dgate, dup, y = module.swiglu_backward_(dy, gate, up, need_y)
    assert dgate is dy
    assert torch.equal(dgate, expected[0]) and torch.equal(dup, expected[1])
    forward = module.swiglu_reference if implementation == "reference" else module.swiglu_forward
    assert torch.equal(y, forward(gate, up) if need_y else y.new_empty(0))


def test_saves_only_gate_and_up():
    saved = []
    gate, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(gate, up)
    assert {tensor.data_ptr() for tensor in saved} == {gate.data_ptr(), up.data_ptr()} and len(saved) == 2


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    torch.manual_seed(0)
    gate, up = torch.randn(301, 1031), torch.randn(301, 1031)
    one, two, three = in_threads(lambda: swiglu(gate, up))
    assert torch.equal(one, two) and torch.equal(one, three)


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_unequal_arguments_are_refused():
    with pytest.raises(ValueError, match=r"gate is \(2, 3\) torch.float32 but up is \(2, 4\)"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="dy must be contiguous"):
        module.swiglu_backward_(torch.ones(3, 2).t(), torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, draw_tensor, dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up = (draw_tensor(generator, (3, 20), dtype, "slice of wider rows") for _ in range(2))
    torch.library.opcheck(torch.ops.minift.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.minift.swiglu_backward.default, (gate, gate, up))
    for need_y in (False, True):
        arguments = (torch.randn(3, 20).to(dtype), gate, up, need_y)
        torch.library.opcheck(torch.ops.minift.swiglu_backward_.default, arguments)
