"""Rotary position embedding of one packed tensor of heads.

Every head's pairs of elements (i, i + E/2) turn by the angle whose cosine and sine are given, the "rotate_half"
pairing of Hugging Face (and not the interleaved one of the paper, Su et al. 2021, arXiv 2104.09864, eq. 34).
fp32 inside, rounded once; Hugging Face rounds cosine, sine and both products in half precision. The backward of a
rotation is the inverse rotation, so nothing but cosine and sine is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension


def apply_rope(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate x (T, H, E) by cos and sin (T, E/2), both fp32 and constants; the result has x's dtype.

    Differentiable in x. Tokens and heads of x may be strided. float64 stays float64.
    """
    num_tokens, _, head_dim = x_THE.shape
    if head_dim % 2 or cos_TR.shape != (num_tokens, head_dim // 2) or sin_TR.shape != cos_TR.shape:
        raise ValueError(
            f"apply_rope: x is {tuple(x_THE.shape)}, cos {tuple(cos_TR.shape)}, sin {tuple(sin_TR.shape)}; expected "
            "x (T, H, E) with an even E, cos and sin (T, E / 2)"
        )
    return _Rope.apply(x_THE, cos_TR, sin_TR)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        return (rope_reference if x_THE.dtype == torch.float64 else _rope)(x_THE, cos_TR, sin_TR, False)

    @staticmethod
    def backward(ctx, dy_THE: Tensor) -> tuple[Tensor, None, None]:
        rotate = rope_reference if dy_THE.dtype == torch.float64 else _rope
        return rotate(dy_THE, *ctx.saved_tensors, True), None, None


def rope_reference(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    """The rotation in plain PyTorch, without autograd; `inverse` turns by minus the angle."""
    wide = torch.promote_types(x_THE.dtype, torch.float32)
    first, second = x_THE.to(wide).chunk(2, dim=-1)
    cos, sin = cos_TR.unsqueeze(1), (-sin_TR if inverse else sin_TR).unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THE.dtype)


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


_rope = extension.op("rope", reference=rope_reference, fake=_rope_fake)
