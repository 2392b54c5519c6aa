"""apply_rope against the rotation in fp64, and the kernels' conversions between dtypes bit by bit.

Tolerance: two products and a sum in fp32 are within 3 u32 = 3 * 2^-24 of the sum of the absolute products, cos and sin
were rounded to fp32 before (u32), and the final rounding adds what conftest.py's `rounding` says.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.ops.rope import apply_rope, rope_reference

HAS_CUDA_KERNELS = True
U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "slice of wider rows", "every second row", "slice of a fused projection", "transposed"]
# The fixtures hold no state between examples.
property_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rotation(x: torch.Tensor, angle_TR: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + R) as complex numbers, times e^(i angle)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle_TR), angle_TR)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@property_test
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 70).map(lambda half: 2 * half)),
        st.tuples(st.integers(1, 40), st.integers(1, 9), st.sampled_from([16, 64, 96, 128])),
    ),
    layout=st.sampled_from(LAYOUTS),
    dy_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    seed=st.integers(0, 999),
)
def test_values_and_gradient_are_the_rotation(
    implementation, draw_tensor, rounding, dtype, shape, layout, dy_layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    x, dy = draw_tensor(generator, shape, dtype, layout), draw_tensor(generator, shape, dtype, dy_layout)
    angle_TR = torch.rand(shape[0], shape[2] // 2, generator=generator, dtype=torch.float64) * 100
    cos, sin = angle_TR.cos().float(), angle_TR.sin().float()
    if implementation == "reference":
        y, dx = rope_reference(x, cos, sin, False), rope_reference(dy, cos, sin, True)
    else:
        x.requires_grad_()
        y = apply_rope(x, cos, sin)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype and y.shape == dx.shape == shape

    for actual, argument, angle in ((y, x, angle_TR), (dx, dy, -angle_TR)):
        argument = argument.detach().double()
        exact = rotation(argument, angle)
        terms = argument.abs() + argument.abs().roll(shape[2] // 2, dims=-1)
        assert ((actual.detach().double() - exact).abs() <= 4 * U32 * terms + 1.01 * rounding(exact, dtype)).all()


def test_is_hugging_face_s_rotation(implementation):
    from transformers.models.llama import modeling_llama as llama
    torch.manual_seed(0)
    x_THE, angle_TR = torch.randn(7, 3, 16), torch.rand(7, 8) * 6
    rope = (lambda *args: rope_reference(*args, False)) if implementation == "reference" else apply_rope
    y = rope(x_THE, angle_TR.cos(), angle_TR.sin())
    angle_1TE = torch.cat((angle_TR, angle_TR), dim=-1)[None]
    expected, _ = llama.apply_rotary_pos_emb(
        x_THE.transpose(0, 1)[None], x_THE.transpose(0, 1)[None], angle_1TE.cos(), angle_1TE.sin()
    )
    torch.testing.assert_close(y, expected[0].transpose(0, 1), rtol=0, atol=4 * 4 * U32)  # elements are below 4


def test_gradcheck_in_float64():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, angle.cos(), angle.sin()), x)


def test_many_threads_give_the_same_bits(instruction_set, in_threads):
    torch.manual_seed(0)
    x, angle = torch.randn(301, 5, 64), torch.rand(301, 32)
    one, two, three = in_threads(lambda: apply_rope(x, angle.cos(), angle.sin()))
    assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("x_shape, cos_shape", [((2, 1, 6), (2, 4)), ((2, 1, 6), (3, 3)), ((2, 1, 5), (2, 2))])
def test_wrong_shapes_are_refused(x_shape, cos_shape):
    with pytest.raises(ValueError, match="expected x"):
        apply_rope(torch.ones(x_shape), torch.ones(cos_shape), torch.ones(cos_shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(instruction_set, draw_tensor, dtype):
    x = draw_tensor(torch.Generator().manual_seed(0), (3, 2, 10), dtype, "slice of wider rows")
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.minift.rope.default, (x, torch.ones(3, 5), torch.ones(3, 5), inverse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_right(instruction_set, dtype):
    """With cos = 1, sin = 0 and nothing in the second half, the first half comes back."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.stack((patterns, torch.zeros_like(patterns)), dim=-1).view(-1, 1, 2)
    y = apply_rope(x, torch.ones(2**16, 1), torch.zeros(2**16, 1))[:, 0, 0]
    wide = apply_rope(x.float(), torch.ones(2**16, 1), torch.zeros(2**16, 1))[:, 0, 0]
    subnormal = (patterns.float().abs() < torch.finfo(dtype).tiny) & (dtype == torch.bfloat16)
    same = (y.view(torch.int16) == patterns.view(torch.int16)) | (y.isnan() & patterns.isnan())
    assert (same | subnormal).all()
    assert (wide == patterns.float())[~patterns.isnan()].all()


@pytest.mark.parametrize("half", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_as_torch_rounds(instruction_set, dtype, half):
    """cos takes every 16381st fp32 bit pattern, ties and their neighbours included, and x is 1."""
    some = torch.arange(-(2**31), 2**31, 16381)
    dropped_bits = 16 if dtype == torch.bfloat16 else 13
    ties = (some >> dropped_bits << dropped_bits) + (1 << dropped_bits - 1)
    bits = torch.cat((some, ties - 1, ties, ties + 1)).to(torch.int32)
    values = bits[: bits.numel() // half * half].view(torch.float32).view(-1, half)
    x = torch.cat((torch.ones_like(values), torch.zeros_like(values)), dim=-1).to(dtype).unsqueeze(1)
    y = apply_rope(x, values, torch.zeros_like(values))[:, 0, :half]
    expected = values.to(dtype)
    # AVX-512 takes bf16 subnormals for zero; signed zeros compare equal.
    subnormal = (values.abs() < torch.finfo(torch.float32).tiny) & (dtype == torch.bfloat16)
    assert ((y == expected) | (y.isnan() & expected.isnan()) | (subnormal & (y == 0))).all()
