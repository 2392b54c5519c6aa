"""Global gradient norm over shards, and clipping by it.

Each element of each parameter lives in exactly one shard of one rank (tied parameters are one parameter, padding is
zero), so the squared norm is one sum over local shards and one all-reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.dist.collectives import sum_over_ranks
from minift.dist.process import World
from minift.optim.shard import FlatShard


def grad_norm(shards: list[FlatShard], world: World) -> Tensor:
    """L2 norm of the whole gradient, fp64, equal on every rank; not finite if a gradient is not."""
    squares = [torch.linalg.vector_norm(shard.grad, dtype=torch.float32).double().square() for shard in shards]
    local = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=world.device)
    return sum_over_ranks(local, world).sqrt()


def clip_grads_(shards: list[FlatShard], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does:
    by min(1, max_norm / (norm + 1e-6))."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    for shard in shards:
        shard.grad.mul_(factor)
