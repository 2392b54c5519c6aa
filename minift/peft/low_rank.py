"""out += scale · dropout(x) Aᵀ Bᵀ: the low-rank update behind LoRA and its relatives, forward and backward written out.

A direct chain (dropout, A, B, scale, add: what PEFT runs) makes a full-width temporary at each step, and autograd saves
most of them. Here the update goes straight into the base projection's fresh output with `addmm_`, and every product is
contracted through the rank first, so that no temporary but dx is wider than r:

    forward    h = x̃ Aᵀ            out += s·h Bᵀ          x̃ = x ⊙ keep_mask; s includes 1/(1-p)
    backward   dh = s·dout B       dB = s·doutᵀ h         dA = dhᵀ x̃        dx = (dh A) ⊙ keep_mask

Saved for backward: x (the very tensor that its producer and its other readers hold, not a copy), h, and with dropout a
mask of one byte per element, from which x̃ is made again. A and B are kept as Parameters and read again in backward: see
`model.linear`. Dropout draws from torch's default generator on x's device, so masks depend on the order of calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank_(out_NO: Tensor, x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float) -> Tensor:
    """Add scale · dropout(x) Aᵀ Bᵀ to `out_NO` in place and return it.

    `out_NO` must be a fresh tensor (autograd forbids views made by another Function) that no backward reads; x is of
    the same dtype. Factors of another dtype (fp32 outside FSDP) are cast to it for the products, since they are small
    and x is not; their gradients come in their own dtype. `dropout`: probability of zeroing an element of x, in [0,
    1), rounded to a multiple of 2^-16; 0 in evaluation.
    """
    num_dropped = min(round(dropout * 2**16), 2**16 - 1)  # of the 2^16 values that 16 random bits may take
    keep_mask = _random_mask(x_NI, num_dropped) if num_dropped > 0 else None
    return _AddLowRank.apply(out_NO, x_NI, A_RI, B_OR, scale / (1.0 - num_dropped / 2**16), keep_mask)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, out_NO: Tensor, x_NI: Tensor, A: Tensor, B: Tensor, scale: float, keep_mask: Tensor | None
    ) -> Tensor:
        _, needs_dx, needs_dA, needs_dB, _, _ = ctx.needs_input_grad
        hidden_NR = _masked(x_NI, keep_mask) @ A.to(x_NI.dtype).t()
        out_NO.addmm_(hidden_NR, B.to(x_NI.dtype).t(), alpha=scale)
        ctx.mark_dirty(out_NO)
        ctx.A, ctx.B, ctx.scale = A, B, scale
        ctx.save_for_backward(
            x_NI if needs_dA else None, hidden_NR if needs_dB else None, keep_mask if needs_dA or needs_dx else None
        )
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_NO: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_dx, needs_dA, needs_dB, _, _ = ctx.needs_input_grad
        x_NI, hidden_NR, keep_mask = ctx.saved_tensors
        dx = dA = dB = None
        if needs_dB:
            dB = (dout_NO.t() @ hidden_NR).mul_(ctx.scale).to(ctx.B.dtype)
        if needs_dx or needs_dA:
            dhidden_NR = (dout_NO @ ctx.B.to(dout_NO.dtype)).mul_(ctx.scale)
            if needs_dA:
                dA = (dhidden_NR.t() @ _masked(x_NI, keep_mask)).to(ctx.A.dtype)
            if needs_dx:
                dx = dhidden_NR @ ctx.A.to(dout_NO.dtype)
                if keep_mask is not None:
                    dx.mul_(keep_mask)
        return dout_NO, dx, dA, dB, None, None


def _random_mask(x: Tensor, num_dropped: int) -> Tensor:
    """Boolean, of x's shape: False with probability num_dropped / 2^16.

    Four elements share one draw of 64 bits: `bernoulli_` takes 12 ns per element on a CPU, longer than the two products
    of a rank-16 update; this takes 2.
    """
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (words.view(torch.int16)[: x.numel()] >= num_dropped - 2**15).view(x.shape)


def _masked(x: Tensor, keep_mask: Tensor | None) -> Tensor:
    return x if keep_mask is None else x * keep_mask
