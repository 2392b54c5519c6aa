"""The global gradient norm, from reduced shards, and what to multiply gradients with so that it is at most a maximum.

Each element of each parameter lives in exactly one shard of a replica (tied parameters are one parameter, padding is
zero), so the squared norm is one sum over local shards and one over the ranks of the shard axis. Nothing is scaled
here: the factor goes into the optimizer's update, which reads the gradients anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.optim.shard import FlatShard


def local_square_sum(shards: list[FlatShard], device: torch.device) -> Tensor:
    """Sum of the squares of all gradients in these shards, fp64; not finite if a gradient is not."""
    squares = [torch.linalg.vector_norm(shard.grad, dtype=torch.float32).double().square() for shard in shards]
    if not squares:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(squares).sum().to(device, non_blocking=True)


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` has it; 1 if there is no maximum. 0-dim and
    of the dtype of `norm`; the host does not wait for it."""
    if max_norm is None:
        return torch.ones_like(norm)
    # Two tensors: of a number and a tensor PyTorch makes a product with the inverse, which is rounded twice.
    return (torch.full_like(norm, max_norm) / (norm + 1e-6)).clamp(max=1.0)
