"""SwiGLU, the gate of the feed-forward block: y = silu(gate) * up with silu(g) = g sigmoid(g).

Paper: Shazeer 2020, arXiv 2002.05202, eq. 6. Computed in fp32 and rounded once, where Hugging Face's two operations
round twice in half precision. Saves gate and up for backward and nothing else; silu is cheap to compute again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable. Both (..., F) of one dtype; rows may be strided. float64 stays float64."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} but up is {tuple(up.shape)} {up.dtype}; "
            "they must have one shape and dtype"
        )
    return _SwiGLU.apply(gate, up)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, without autograd."""
    return (swiglu_reference if gate.dtype == torch.float64 else _swiglu)(gate, up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return (swiglu_backward_reference if gate.dtype == torch.float64 else _swiglu_backward)(dy, gate, up)


def swiglu_backward_(dy: Tensor, gate: Tensor, up: Tensor, need_y: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the gradient of gate in the place of dy, which nobody else may need; then y, to the bit what forward
    gave, made again of what is read here anyway, or without elements if nobody needs it."""
    run = swiglu_backward_in_place_reference if gate.dtype == torch.float64 else _swiglu_backward_
    return dy, *run(dy, gate, up, need_y)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_backward(dy, *ctx.saved_tensors)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, without autograd."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dgate = dy up s (1 + g (1 - s)) and dup = dy g s, with s = sigmoid(g); fp32 inside, in plain PyTorch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy_wide, gate_wide, up_wide = dy.to(wide), gate.to(wide), up.to(wide)
    sigmoid = torch.sigmoid(gate_wide)
    dgate = dy_wide * up_wide * (sigmoid * (1 + gate_wide * torch.sigmoid(-gate_wide)))
    return dgate.to(gate.dtype), (dy_wide * (gate_wide * sigmoid)).to(up.dtype)


def swiglu_backward_in_place_reference(
    dy: Tensor, gate: Tensor, up: Tensor, need_y: bool = False
) -> tuple[Tensor, Tensor]:
    """dgate goes into dy; returns dup, and y or nothing."""
    dgate, dup = swiglu_backward_reference(dy, gate, up)
    dy.copy_(dgate)
    return dup, swiglu_reference(gate, up) if need_y else gate.new_empty(0)


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_backward_in_place_fake(dy: Tensor, gate: Tensor, up: Tensor, need_y: bool) -> tuple[Tensor, Tensor]:
    return up.new_empty(up.shape), gate.new_empty(gate.shape if need_y else 0)


_swiglu = extension.op("swiglu", reference=swiglu_reference, fake=_swiglu_fake)
_swiglu_backward = extension.op("swiglu_backward", reference=swiglu_backward_reference, fake=_swiglu_backward_fake)
_swiglu_backward_ = extension.op(
    "swiglu_backward_", reference=swiglu_backward_in_place_reference, fake=_swiglu_backward_in_place_fake
)
