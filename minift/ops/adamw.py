"""One AdamW update of a flat range of weights, in place and in one pass over memory.

    g = f g     m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     w = keep w - step_size m / (sqrt(v) + eps)

Paper: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, with the bias corrections folded into step_size and
eps by the caller (`minift/optim/adamw.py`). fp32 inside. Weights are fp32, in one tensor or in two halves of which the
upper one is what is sent (`halves.py`); or bf16, rounded stochastically (`rounding.py`).

Bytes per element that go over the bus: 28 (fp32 weights) or 24 (bf16), each of them once. That is all the time it
takes, as long as nobody goes over the same memory twice: the reference, seven element-wise operations, works on blocks
that stay in the cache for this reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.halves import read_weights, write_weights_
from minift.ops.rounding import random_bits, round_stochastically_

# Of the reference. In L3: starting an operation on a block that fits into L2 takes as long as running it. On a GPU a
# block is large enough to hide its launches, and its scratch is 64 MiB, or up to 256 MiB with bf16 masters and halves.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


class AdamWStep(NamedTuple):
    """The constants of one step, for weights that are treated alike, in the order in which the ops take them.

    eps: already times sqrt(1 - beta2^t).
    step_size: lr sqrt(1 - beta2^t) / (1 - beta1^t).
    keep: what weight decay leaves of a weight, 1 - lr * decay.
    key: where the random bits of the parameter begin (`rounding.stream_key`); read with bf16 masters only.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    keep: float
    key: int


@dataclass(frozen=True)
class Weights:
    """A range of weights that is updated. All contiguous.

    master: (n,) fp32 or bf16; updated in place.
    grad: (n,) fp32; only read.
    first: number of element 0 within its parameter, for random bits.
    lower: (n,) int16, the other half of fp32 weights whose upper half is `master`; updated too. None: there is none.
    """

    master: Tensor
    grad: Tensor
    first: int = 0
    lower: Tensor | None = None


def adamw_(weights: Weights, exp_avg: Tensor, exp_avg_sq: Tensor, grad_factor: Tensor | None, step: AdamWStep) -> None:
    """Update weights, exp_avg (m) and exp_avg_sq (v) in place.

    exp_avg, exp_avg_sq: (n,) fp32, contiguous.
    grad_factor: f, one fp32 on the same device, which the host does not wait for; None: 1. If it is infinite or NaN,
        nothing is written.
    """
    moments = exp_avg, exp_avg_sq
    _adamw(weights.master, weights.grad, *moments, weights.lower, grad_factor, *step, weights.first)


def adamw_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lower: Tensor | None,
    grad_factor: Tensor | None,
    *constants: float,
) -> None:
    """`adamw_` in plain PyTorch, for which the host waits for grad_factor; constants: of an `AdamWStep`, then
    `first`."""
    if grad_factor is not None and not torch.isfinite(grad_factor):
        return
    *of_step, first = constants
    step = AdamWStep(*of_step)
    block = min(BLOCK_ELEMENTS[master.device.type], len(master))
    scratch = torch.empty(block, dtype=torch.float32, device=master.device)
    for start in range(0, len(master), max(block, 1)):
        here = slice(start, start + block)
        g, m, v = grad[here], exp_avg[here], exp_avg_sq[here]
        if grad_factor is not None:
            g = torch.mul(g, grad_factor, out=scratch[: len(g)])
        m.lerp_(g, 1.0 - step.beta1)
        v.mul_(step.beta2).addcmul_(g, g, value=1.0 - step.beta2)
        denominator = torch.sqrt(v, out=scratch[: len(v)]).add_(step.eps)
        update_weights_(master[here], None if lower is None else lower[here], m, denominator, step, first + start)


def update_weights_(
    master: Tensor, lower: Tensor | None, exp_avg: Tensor, denominator: Tensor, step: AdamWStep, first: int
) -> None:
    """weight = keep weight - step_size exp_avg / denominator; of bf16 weights with stochastic rounding."""
    wide = read_weights(master, lower).float()  # of fp32 weights themselves
    if step.keep != 1.0:
        wide.mul_(step.keep)
    wide.addcdiv_(exp_avg, denominator, value=-step.step_size)
    if lower is not None:
        write_weights_(master, lower, wide)
    elif master.dtype == torch.bfloat16:
        round_stochastically_(master, wide, random_bits(step.key, first, len(master), master.device))


def _adamw_fake(*arguments: object) -> None:
    """Nothing is returned."""


_adamw = extension.op("adamw", reference=adamw_reference, fake=_adamw_fake)
