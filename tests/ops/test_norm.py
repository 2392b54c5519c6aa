"""rms_norm and its backward against the formula in fp64.

Tolerances, with u32 = 2^-24: a sum of D terms in at least 16 interleaved partial
sums is off by at most (D / 16 + 8) u32 of the sum of absolute terms; every further fp32 operation adds u32, every
rounding to the dtype what conftest.py's `rounding` says.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops import norm

HAS_CUDA_KERNELS = True
U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    "contiguous",
    "slice of wider rows",
    "every second row",
    "slice of a fused projection",
    "transposed",
    "expanded",
]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 150)),
    st.tuples(st.integers(1, 7), st.integers(1, 700).map(lambda packs: 8 * packs)),
    st.tuples(st.integers(1, 7), st.integers(1000, 1100).map(lambda packs: 8 * packs)),  # more than a block holds
    st.tuples(st.integers(200, 900), st.sampled_from([8, 15, 40])),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
)
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(shape=SHAPES, layout=st.sampled_from(LAYOUTS), eps=st.sampled_from([1e-5, 1e-6, 1.0]), seed=st.integers(0, 999))
def test_forward_is_the_formula(implementation, draw_tensor, rounding, dtype, shape, layout, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = draw_tensor(generator, shape, dtype, layout), draw_tensor(generator, shape[-1:], dtype)
    rms_norm = norm.rms_norm_reference if implementation == "reference" else norm.rms_norm
    y, rstd = rms_norm(x, weight, eps)

    assert y.dtype == dtype and y.shape == x.shape and rstd.dtype == torch.float32 and rstd.shape == x.shape[:-1]
    exact_rstd = (x.double().square().mean(-1) + eps).rsqrt()
    rstd_error = (shape[-1] / 16 + 12) * U32
    assert ((rstd - exact_rstd).abs() <= rstd_error * exact_rstd).all()
    exact = formula(x.double(), weight.double(), eps)
    # Two roundings, the first of them of x rstd and then multiplied by the weight; 1 % for their product.
    limit = (rstd_error + 2 * U32) * exact.abs() + rounding(exact, dtype)
    limit += rounding(exact / weight.double(), dtype) * weight.double().abs()
    assert ((y.double() - exact).abs() <= 1.01 * limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(shape=SHAPES, layout=st.sampled_from(LAYOUTS), need_dweight=st.booleans(), seed=st.integers(0, 999))
def test_backward_is_autograd_of_the_formula(
    implementation, draw_tensor, rounding, dtype, shape, layout, need_dweight, seed
):
    eps = 1e-5
    generator = torch.Generator().manual_seed(seed)
    x, dy = draw_tensor(generator, shape, dtype, layout), draw_tensor(generator, shape, dtype, layout)
    weight = draw_tensor(generator, shape[-1:], dtype)
    _, rstd = norm.rms_norm_reference(x, weight, eps)
    if implementation == "reference":
        dx, dweight = norm.rms_norm_backward_reference(dy, x, weight, rstd, None, need_dweight)
    else:
        dx, dweight = norm.rms_norm_backward(dy, x, weight, rstd, None, need_dweight)
        assert (dweight is not None) == need_dweight

    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    exact_dx, exact_dweight = torch.autograd.grad(formula(x64, weight64, eps), (x64, weight64), dy.double())
    # dx = rstd (g - n mean(g n)): the error of each term is relative to that term, not to their difference.
    normed = (x64 * (x64.square().mean(-1, keepdim=True) + eps).rsqrt()).detach()
    scaled = dy.double() * weight.double()
    mean_of_absolutes = (scaled * normed).abs().mean(-1, keepdim=True)
    terms = rstd.double().unsqueeze(-1) * (scaled.abs() + normed.abs() * mean_of_absolutes)
    limit = (shape[-1] / 8 + 32) * U32 * terms + rounding(exact_dx, dtype)
    assert dx.dtype == dtype
    assert ((dx.double() - exact_dx).abs() <= limit).all()
    if need_dweight:
        num_rows = x[..., 0].numel()
        sum_of_absolutes = (dy.double() * normed).abs().reshape(num_rows, -1).sum(0)
        assert dweight.dtype == torch.float32
        limit = (num_rows + shape[-1] / 16 + 16) * U32 * sum_of_absolutes + 1e-37
        assert ((dweight.double() - exact_dweight).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    shape=SHAPES,
    layout=st.sampled_from(LAYOUTS),
    residual_layout=st.sampled_from(LAYOUTS),
    need_dweight=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_residual_s_gradient_is_added_to_the_rounded_dx(
    implementation, draw_tensor, dtype, shape, layout, residual_layout, need_dweight, seed
):
    """To the bit what an addition after it gives, where rows are alike: how they lie decides which kernel runs. And, in
    whatever rows it comes, to a dx of zero."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, alike = (draw_tensor(generator, shape, dtype, layout) for _ in range(3))
    other = draw_tensor(generator, shape, dtype, residual_layout)
    weight = draw_tensor(generator, shape[-1:], dtype)
    _, rstd = norm.rms_norm_reference(x, weight, 1e-5)
    backward = norm.rms_norm_backward_reference if implementation == "reference" else norm.rms_norm_backward
    dx, dweight = backward(dy, x, weight, rstd, None, need_dweight)
    total, same_dweight = backward(dy, x, weight, rstd, alike, need_dweight)
    assert torch.equal(total, dx + alike)
    assert not need_dweight or torch.equal(dweight, same_dweight)
    assert torch.equal(backward(torch.zeros_like(dy), x, weight, rstd, other, need_dweight)[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_hugging_face_rounds(implementation, dtype):
    """rstd may differ in its last bit, which moves a row element over a rounding border once in hundreds."""
    from transformers.models.llama import modeling_llama as llama
    torch.manual_seed(0)
    module = llama.LlamaRMSNorm(576, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
        x = torch.randn(40, 576).to(dtype)
        rms_norm = norm.rms_norm_reference if implementation == "reference" else norm.rms_norm
        y, _ = rms_norm(x, module.weight, 1e-5)
        assert (y == module(x)).float().mean() > 0.995


def test_dweight_of_many_rows_does_not_depend_on_the_number_of_threads(instruction_set, in_threads):
    torch.manual_seed(0)
    x, dy, weight = torch.randn(3001, 48), torch.randn(3001, 48), torch.randn(48)
    _, rstd = norm.rms_norm(x, weight, 1e-5)
    one, two, three = in_threads(lambda: norm.rms_norm_backward(dy, x, weight, rstd, None, True)[1])
    assert torch.equal(one, two) and torch.equal(one, three)
    terms = dy.double() * x.double() * rstd.double().unsqueeze(-1)
    # At most 64 blocks of 47 rows, and two products.
    assert ((one.double() - terms.sum(0)).abs() <= (64 + 47 + 2) * U32 * terms.abs().sum(0)).all()


def test_a_nan_stays_in_its_row(implementation):
    x = torch.ones(3, 20, dtype=torch.bfloat16)
    x[1, 19] = float("nan")
    rms_norm = norm.rms_norm_reference if implementation == "reference" else norm.rms_norm
    y, _ = rms_norm(x, torch.ones(20, dtype=torch.bfloat16), 1e-5)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_no_rows(implementation):
    rms_norm = norm.rms_norm_reference if implementation == "reference" else norm.rms_norm
    y, rstd = rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)
    assert y.shape == (0, 8) and rstd.shape == (0,)
    _, dweight = norm.rms_norm_backward(y, y, torch.ones(8), rstd, y, True)
    assert torch.equal(dweight, torch.zeros(8))


def test_float64_is_computed_in_float64():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    y, rstd = norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(y, formula(x, weight, 1e-5), rtol=1e-14, atol=1e-14)
    assert norm.rms_norm_backward(y, x, weight, rstd, x, True)[1].dtype == torch.float64


def test_a_weight_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match="weight is torch.float32 but x is torch.bfloat16"):
        norm.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4), 1e-5)


def test_wrong_shapes_are_refused(instruction_set):
    with pytest.raises(RuntimeError, match="as long as the last dimension"):
        norm.rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)
    with pytest.raises(RuntimeError, match="one element for every row"):
        norm.rms_norm_backward(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), torch.ones(3), None, False)
    with pytest.raises(RuntimeError, match="dresidual must have the shape"):
        norm.rms_norm_backward(
            torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), torch.ones(2), torch.ones(2, 5), False
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, draw_tensor, dtype):
    generator = torch.Generator().manual_seed(0)
    x = draw_tensor(generator, (3, 5, 20), dtype, "slice of wider rows")
    weight, rstd = draw_tensor(generator, (20,), dtype), torch.ones(3, 5)
    torch.library.opcheck(torch.ops.minift.rms_norm.default, (x, weight, 1e-5))
    for dresidual, need_dweight in itertools.product((None, x), (False, True)):
        args = (x, x, weight, rstd, dresidual, need_dweight)
        torch.library.opcheck(torch.ops.minift.rms_norm_backward.default, args)
