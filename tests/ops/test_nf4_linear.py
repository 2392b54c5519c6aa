"""Products with NF4 weights against fp64 products of the dequantised weight.

Tolerance, with u = eps / 2 of the dtype and u32 = 2^-24: rounding the weight (or the codebook) moves each of the D
terms of a sum by u of itself, fp32 summation by at most D u32, and the result is rounded once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minift.ops import nf4, nf4_linear

HAS_CUDA_KERNELS = True
U32 = 2.0**-24
LAYOUTS = ["contiguous", "slice of wider rows", "transposed", "expanded"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The fixtures hold no state between examples.
property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def kernels(implementation, monkeypatch):
    """The plain-PyTorch reference behind the public functions, or one instruction set."""
    if implementation == "reference":
        monkeypatch.setattr(nf4, "_dequantize", nf4.dequantize_nf4_reference)
        monkeypatch.setattr(nf4_linear, "_gemv", nf4_linear.nf4_gemv_reference)
    return implementation


def draw_matrix(generator: torch.Generator, shape: tuple[int, int], block_size: int, double: bool) -> nf4.Nf4:
    codes, absmax = nf4.quantize_nf4(torch.randn(shape, generator=generator) / 8, block_size)
    if not double:
        return nf4.Nf4(codes=codes, absmax=absmax, shape=shape, block_size=block_size)
    scales, nested_absmax, offset = nf4.quantize_scales(absmax)
    return nf4.Nf4(
        codes=codes, scales=scales, nested_absmax=nested_absmax, offset=offset, shape=shape, block_size=block_size
    )


def assert_is_product(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rounding) -> None:
    """actual = left @ right, both fp64, within the tolerance above."""
    exact, absolute = left @ right, left.abs() @ right.abs()
    limit = (torch.finfo(actual.dtype).eps / 2 + (left.shape[1] + 4) * U32) * absolute + rounding(exact, actual.dtype)
    # fp16 weights near zero are subnormal: half of their spacing per term.
    limit += 2.0**-25 * left.abs().sum(1, keepdim=True) if actual.dtype == torch.float16 else 0
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= 1.01 * limit).all()


cases = {
    "tokens": st.one_of(st.integers(0, 20), st.integers(60, 70)),
    "num_outputs": st.integers(1, 40),
    "num_inputs": st.one_of(st.integers(1, 20).map(lambda blocks: 32 * blocks), st.integers(1, 100)),
    "block_size": st.sampled_from([32, 64, 128, 256]),
    "double": st.booleans(),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(**cases)
def test_forward_is_the_product(
    kernels, draw_tensor, rounding, dtype, tokens, num_outputs, num_inputs, block_size, double, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    matrix = draw_matrix(generator, (num_outputs, num_inputs), block_size, double)
    x = draw_tensor(generator, (tokens, num_inputs), dtype, layout)
    y = nf4_linear.nf4_linear(x, matrix)
    assert y.dtype == dtype
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(num_outputs, num_inputs)
    assert_is_product(y, x.double(), weight.t(), rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(**cases)
def test_the_input_gradient_is_the_product(
    kernels, draw_tensor, rounding, dtype, tokens, num_outputs, num_inputs, block_size, double, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    matrix = draw_matrix(generator, (num_outputs, num_inputs), block_size, double)
    dy = draw_tensor(generator, (tokens, num_outputs), dtype, layout)
    dx = nf4_linear.nf4_linear_dx(dy, matrix)
    assert dx.dtype == dtype
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(num_outputs, num_inputs)
    assert_is_product(dx, dy.double(), weight, rounding)


@pytest.mark.parametrize("is_forward", [True, False])
@pytest.mark.parametrize("slice_bytes", [1, 5000, nf4_linear.SLICE_BYTES])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(property_test, max_examples=15)
@given(**cases)
def test_added_to_what_is_there(
    draw_tensor, rounding, monkeypatch, is_forward, slice_bytes, dtype, tokens, num_outputs, num_inputs, block_size,
    double, layout, seed,
):  # fmt: skip
    """Rounded once, after the addition; the product of few tokens before it, too."""
    monkeypatch.setattr(nf4_linear, "SLICE_BYTES", slice_bytes)
    generator = torch.Generator().manual_seed(seed)
    matrix = draw_matrix(generator, (num_outputs, num_inputs), block_size, double)
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(num_outputs, num_inputs)
    weight, run = (weight.t(), nf4_linear.nf4_linear) if is_forward else (weight, nf4_linear.nf4_linear_dx)
    x = draw_tensor(generator, (tokens, weight.shape[0]), dtype, layout)
    add_to = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
    before = add_to.double()
    assert run(x, matrix, add_to) is add_to
    product, absolute = x.double() @ weight, x.double().abs() @ weight.abs()
    limit = torch.finfo(dtype).eps / 2 * absolute + rounding(product + before, dtype)
    limit += rounding(product, dtype) if is_forward and tokens <= nf4_linear.FEW_TOKENS else 0
    limit += (len(weight) + 5) * U32 * (absolute + before.abs())
    limit += 2.0**-25 * x.double().abs().sum(1, keepdim=True) if dtype == torch.float16 else 0
    assert ((add_to.double() - product - before).abs() <= 1.01 * limit).all()


def test_adding_needs_no_second_tensor_of_the_same_size(monkeypatch):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(nf4_linear, "SLICE_BYTES", 64 * 24 * 4)
    matrix = draw_matrix(torch.Generator().manual_seed(0), (24, 256), 64, double=True)
    dy, add_to = torch.randn(100, 24), torch.zeros(100, 256)
    known = {tensor.untyped_storage().data_ptr() for tensor in (dy, add_to)}
    with Sizes() as sizes:
        nf4_linear.nf4_linear_dx(dy, matrix, add_to)
        nf4_linear.nf4_linear(add_to, matrix, dy)
    assert 0 < sizes.largest <= nf4_linear.SLICE_BYTES < min(dy.nbytes, add_to.nbytes)


@pytest.mark.parametrize("slice_bytes", [1, 5000, 20000])
@pytest.mark.parametrize("shape", [(37, 192), (64, 96), (50, 33)])
def test_the_slices_do_not_matter(monkeypatch, rounding, shape, slice_bytes):
    """Rows of 192 are whole blocks; of 96, every second row starts a block; of 33, every 64th."""
    generator = torch.Generator().manual_seed(0)
    matrix = draw_matrix(generator, shape, 64, double=True)
    x, dy = torch.randn(30, shape[1], generator=generator), torch.randn(30, shape[0], generator=generator)
    monkeypatch.setattr(nf4_linear, "SLICE_BYTES", slice_bytes)
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(shape)
    assert_is_product(nf4_linear.nf4_linear(x, matrix), x.double(), weight.t(), rounding)
    assert_is_product(nf4_linear.nf4_linear_dx(dy, matrix), dy.double(), weight, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_inputs", "block_size"),
    [(64, 64), (576, 64), (4160, 64), (8192, 64), (12352, 64), (9248, 32), (6144, 2048), (12288, 4096)],
)
def test_few_tokens_and_long_rows(kernels, rounding, dtype, num_inputs, block_size):
    """Rows longer than a stretch of scales, with and without an incomplete chunk at the end; blocks longer than both,
    too: a stretch of 8 tokens has 1024 elements."""
    generator = torch.Generator().manual_seed(num_inputs)
    matrix = draw_matrix(generator, (19, num_inputs), block_size, double=True)
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(19, num_inputs)
    x = torch.randn(15, num_inputs, generator=generator).to(dtype)
    assert_is_product(nf4_linear.nf4_linear(x, matrix), x.double(), weight.t(), rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("address", [1, 2, 4, 8, 16])
def test_codes_anywhere_in_a_buffer_of_bytes(kernels, rounding, address, dtype):
    generator = torch.Generator().manual_seed(address)
    matrix = draw_matrix(generator, (19, 192), 64, double=True)
    memory = torch.empty(address + matrix.codes.numel(), dtype=torch.uint8)
    codes = memory[address:].copy_(matrix.codes)
    x = torch.randn(5, 192, generator=generator).to(dtype)
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(19, 192)
    for tokens in (x[:1], x):
        y = nf4_linear.nf4_linear(tokens, replace(matrix, codes=codes))
        assert_is_product(y, tokens.double(), weight.t(), rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads(instruction_set, in_threads, dtype):
    """For few tokens: 15 are computed as 8 + 4 + 2 + 1."""
    generator = torch.Generator().manual_seed(0)
    matrix = draw_matrix(generator, (203, 704), 64, double=True)
    x = torch.randn(15, 704, generator=generator).to(dtype)
    results = in_threads(lambda: nf4_linear.nf4_linear(x, matrix))
    results += in_threads(lambda: torch.cat([nf4_linear.nf4_linear(token.unsqueeze(0), matrix) for token in x]))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_float64_is_computed_in_float64():
    generator = torch.Generator().manual_seed(0)
    matrix = draw_matrix(generator, (20, 64), 64, double=False)
    weight = nf4.dequantize_nf4(matrix, torch.float64).view(20, 64)
    x = torch.randn(3, 64, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(nf4_linear.nf4_linear(x, matrix), x @ weight.t(), rtol=1e-14, atol=1e-14)
    dy = torch.randn(3, 20, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(nf4_linear.nf4_linear_dx(dy, matrix), dy @ weight, rtol=1e-14, atol=1e-14)


def test_an_input_that_requires_grad_gives_a_result_without():
    matrix = draw_matrix(torch.Generator().manual_seed(0), (20, 64), 64, double=False)
    for tokens in (1, 100):
        x = torch.randn(tokens, 64, requires_grad=True)
        assert not nf4_linear.nf4_linear(x, matrix).requires_grad


def test_shapes_that_do_not_fit_are_refused():
    matrix = draw_matrix(torch.Generator().manual_seed(0), (20, 64), 64, double=False)
    for x in (torch.randn(3, 20), torch.randn(64), torch.randn(2, 3, 64)):
        with pytest.raises(ValueError, match="expected a weight .out, in. and x .T, in."):
            nf4_linear.nf4_linear(x, matrix)
    with pytest.raises(ValueError, match="expected a weight .out, in. and dy .T, out."):
        nf4_linear.nf4_linear_dx(torch.randn(3, 64), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, dtype):
    generator = torch.Generator().manual_seed(0)
    for double in (False, True):
        matrix = draw_matrix(generator, (7, 96), 32, double)
        arguments = (torch.randn(3, 96).to(dtype), matrix.codes, *nf4.scale_tensors(matrix), 32)
        torch.library.opcheck(torch.ops.minift.nf4_gemv.default, arguments)


def test_the_op_refuses_tensors_that_do_not_belong_together(instruction_set):
    matrix = draw_matrix(torch.Generator().manual_seed(0), (4, 64), 64, double=False)
    for width, block_size in ((96, 64), (192, 64), (64, 32)):
        with pytest.raises(RuntimeError, match="nf4_gemv"):
            torch.ops.minift.nf4_gemv(torch.randn(1, width), matrix.codes, *nf4.scale_tensors(matrix), block_size)
    one_too_many = torch.cat([matrix.codes, matrix.codes[:1]])
    with pytest.raises(RuntimeError, match="nf4_gemv: codes and scales must be those of a matrix"):
        torch.ops.minift.nf4_gemv(torch.randn(1, 64), one_too_many, *nf4.scale_tensors(matrix), 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_the_scales_of_an_earlier_matrix(instruction_set, dtype):
    """Beyond the end of a row x is zero, and zero times a NaN that lies there is none."""
    poisoned = draw_matrix(torch.Generator().manual_seed(0), (20, 4096), 32, double=False)
    poisoned.absmax.fill_(torch.nan)
    for num_inputs in (32, 96, 160, 224, 4096 + 32):
        matrix = draw_matrix(torch.Generator().manual_seed(1), (5, num_inputs), 32, double=False)
        for tokens in (1, 2, 4, 8):
            assert nf4_linear.nf4_linear(torch.ones(tokens, 4096, dtype=dtype), poisoned).isnan().all()
            assert nf4_linear.nf4_linear(torch.ones(tokens, num_inputs, dtype=dtype), matrix).isfinite().all()


@given(
    count=st.integers(1, 20000),
    unit=st.sampled_from([1, 2, 64, 96, 128]),
    bytes_each=st.integers(1, 60000),
)
def test_slices_for_a_gpu_are_whole_tiles_of_about_one_size(count, unit, bytes_each):
    width = nf4_linear.slice_width(count, unit, bytes_each, is_on_gpu=True)
    tile = math.lcm(unit, nf4_linear.GPU_TILE)
    assert 0 < width <= count and (width == count or width % tile == 0)
    assert width * bytes_each <= 1.5 * nf4_linear.GPU_SLICE_BYTES + tile * bytes_each
