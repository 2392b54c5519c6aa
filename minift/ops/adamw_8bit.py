"""One AdamW update of a flat range of weights whose moments are 8-bit codes, in place and in one pass over memory.

    m, v = dequantised        the update of `adamw.py`, with m and v in fp32        m, v quantised again, block by block

Dettmers et al. 2021, arXiv 2110.02861. The weights are updated from the new moments before these are rounded, as
bitsandbytes does. Blocks are counted from element 0 of the range, so ranges begin where blocks begin. Bytes per element
that go over the bus: 16 (fp32 master) or 12 (bf16).

Elements of a block depend on each other through its absmax, so a gradient that is not finite spoils the states of its
whole block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.adamw import BLOCK_ELEMENTS, AdamWStep, Weights, update_weights_
from minift.ops.blockwise import BLOCK, DynamicMap, dequantize_blockwise, quantize_blockwise


@dataclass(frozen=True)
class QuantizedMoments:
    """exp_avg_codes, exp_avg_sq_codes: (n,) uint8. exp_avg_absmax, exp_avg_sq_absmax: (ceil(n / 256),) fp32."""

    exp_avg_codes: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_codes: Tensor
    exp_avg_sq_absmax: Tensor


def adamw_8bit_(
    weights: Weights,
    moments: QuantizedMoments,
    signed_map: DynamicMap,
    unsigned_map: DynamicMap,
    grad_factor: Tensor | None,
    step: AdamWStep,
) -> None:
    """Update weights and moments in place; `adamw_` says what the rest is. The maps are on the weights' device."""
    _adamw_8bit(
        weights.master, weights.grad,
        moments.exp_avg_codes, moments.exp_avg_absmax, moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax,
        signed_map.values, signed_map.buckets, unsigned_map.values, unsigned_map.buckets,
        weights.lower, grad_factor, *step, weights.first,
    )  # fmt: skip


def adamw_8bit_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg_codes: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq_codes: Tensor,
    exp_avg_sq_absmax: Tensor,
    signed_values: Tensor,
    signed_buckets: Tensor,
    unsigned_values: Tensor,
    unsigned_buckets: Tensor,
    lower: Tensor | None,
    grad_factor: Tensor | None,
    *constants: float,
) -> None:
    """`adamw_8bit_` in plain PyTorch, for which the host waits for grad_factor; constants: of an `AdamWStep`, then
    `first`. Scratch: fp32 moments, and what quantising takes, of one piece."""
    if grad_factor is not None and not torch.isfinite(grad_factor):
        return
    *of_step, first = constants
    step = AdamWStep(*of_step)
    signed_map = DynamicMap(signed_values, signed_buckets)
    unsigned_map = DynamicMap(unsigned_values, unsigned_buckets)
    piece = BLOCK_ELEMENTS[master.device.type]
    assert piece % BLOCK == 0
    for start in range(0, len(master), piece):
        here, blocks = slice(start, start + piece), slice(start // BLOCK, (start + piece) // BLOCK)
        g = grad[here] if grad_factor is None else grad[here] * grad_factor
        m = dequantize_blockwise(exp_avg_codes[here], exp_avg_absmax[blocks], signed_map).lerp_(g, 1.0 - step.beta1)
        v = dequantize_blockwise(exp_avg_sq_codes[here], exp_avg_sq_absmax[blocks], unsigned_map)
        v.mul_(step.beta2).addcmul_(g, g, value=1.0 - step.beta2)
        denominator = torch.sqrt(v).add_(step.eps)
        update_weights_(master[here], None if lower is None else lower[here], m, denominator, step, first + start)
        for values, codes, absmax, dynamic_map in (
            (m, exp_avg_codes, exp_avg_absmax, signed_map),
            (v, exp_avg_sq_codes, exp_avg_sq_absmax, unsigned_map),
        ):
            new_codes, new_absmax = quantize_blockwise(values, dynamic_map)
            codes[here].copy_(new_codes)
            absmax[blocks].copy_(new_absmax)


def _adamw_8bit_fake(*arguments: object) -> None:
    """Nothing is returned."""


_adamw_8bit = extension.op("adamw_8bit", reference=adamw_8bit_reference, fake=_adamw_8bit_fake)
