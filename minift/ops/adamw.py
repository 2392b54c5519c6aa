"""One AdamW update of a flat range of weights, in place and in one pass over memory.

    g = f g     m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     w = keep w - step_size m / (sqrt(v) + eps)

Paper: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, with the bias corrections folded into step_size and
eps by the caller (`minift/optim/adamw.py`). fp32 inside. A bf16 master is rounded stochastically (`rounding.py`).

Bytes per element that go over the bus: 28 (fp32 master) or 24 (bf16), each of them once. That is all the time it takes,
as long as nobody goes over the same memory twice: the reference, seven element-wise operations, works on blocks that
stay in the cache for this reason. On a GPU the reference is also what runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops import extension
from minift.ops.rounding import random_bits, round_stochastically_

# Of the reference. In L3: starting an operation on a block that fits into L2 takes as long as running it. On a GPU a
# block is large enough to hide its launches, and its scratch is 64 MiB, or up to 256 MiB with bf16 masters.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class AdamWStep:
    """The constants of one step, for weights that are treated alike.

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


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_factor: Tensor | None,
    step: AdamWStep,
    first: int,
) -> None:
    """Update master, exp_avg (m) and exp_avg_sq (v) in place.

    master: (n,) fp32 or bf16. grad, exp_avg, exp_avg_sq: (n,) fp32. All contiguous.
    grad_factor: f, one fp32 on the same device, which the host does not wait for; None: 1.
    first: number of element 0 within its parameter, for random bits.
    """
    _adamw(
        master, grad, exp_avg, exp_avg_sq, grad_factor,
        step.beta1, step.beta2, step.eps, step.step_size, step.keep, step.key, first,
    )  # fmt: skip


def adamw_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_factor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    keep: float,
    key: int,
    first: int,
) -> None:
    """`adamw_` in plain PyTorch."""
    whole = (master, grad, exp_avg, exp_avg_sq)
    block = min(BLOCK_ELEMENTS[master.device.type], len(master))
    scratch = torch.empty(block, dtype=torch.float32, device=master.device)
    for start in range(0, len(master), max(block, 1)):
        w, g, m, v = (tensor[start : start + block] for tensor in whole)
        if grad_factor is not None:
            g = torch.mul(g, grad_factor, out=scratch[: len(g)])
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = torch.sqrt(v, out=scratch[: len(v)]).add_(eps)
        update_weights_(w, m, denominator, step_size, keep, key, first + start)


def update_weights_(
    weights: Tensor, exp_avg: Tensor, denominator: Tensor, step_size: float, keep: float, key: int, first: int
) -> None:
    """weights (fp32, or bf16 with stochastic rounding) = keep weights - step_size exp_avg / denominator."""
    wide = weights.float()  # fp32 weights themselves
    if keep != 1.0:
        wide.mul_(keep)
    wide.addcdiv_(exp_avg, denominator, value=-step_size)
    if weights.dtype == torch.bfloat16:
        round_stochastically_(weights, wide, random_bits(key, first, len(weights), weights.device))


def _adamw_fake(*arguments: object) -> None:
    """Nothing is returned."""


_adamw = extension.op("adamw", reference=adamw_reference, fake=_adamw_fake)
