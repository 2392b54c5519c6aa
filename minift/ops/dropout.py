"""Dropout whose mask is a function of (seed, element index), so that backward makes it again instead of keeping it.

Element e, counted along rows whatever the strides, is zeroed if 16 random bits of its own (`rounding.random_bits`, with
the seed as key) are below `num_dropped`. So probabilities are multiples of 2^-16, and the mask is the same on every
device, for every dtype and number of threads. What is kept is not scaled: 1 / (1 - p) is cheaper in a smaller operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.rounding import random_bits

DROPOUT_STEPS = 2**16


def dropout_steps(probability: float) -> int:
    """`num_dropped` for a probability in [0, 1): the nearest of the values below DROPOUT_STEPS."""
    return min(round(probability * DROPOUT_STEPS), DROPOUT_STEPS - 1)


def draw_seed() -> int:
    """64 bits, as a signed integer, from torch's default CPU generator."""
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))


def dropout(x: Tensor, seed: int, num_dropped: int) -> Tensor:
    """x with zeros where the mask says so, contiguous; not differentiable. Any float dtype and layout, dim >= 1."""
    return (dropout_reference if x.dtype == torch.float64 else _dropout)(x, seed, num_dropped)


def dropout_reference(x: Tensor, seed: int, num_dropped: int) -> Tensor:
    """`dropout` in plain PyTorch."""
    keep = random_bits(seed, 0, x.numel(), x.device) >= num_dropped
    return torch.where(keep.view(x.shape), x, 0.0).contiguous()


def _dropout_fake(x: Tensor, seed: int, num_dropped: int) -> Tensor:
    return x.new_empty(x.shape)


_dropout = extension.op("dropout", reference=dropout_reference, fake=_dropout_fake)
