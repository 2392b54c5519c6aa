"""Collectives over small things: counts, losses, flags, Python objects. Bulk tensors: `minift.fsdp.transport`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minift.dist.process import World


def scalars(values: Sequence[float], device: torch.device) -> Tensor:
    """fp64 (n,) on `device`, for which the host does not wait, as it would for a copy of its own memory."""
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def sum_over_ranks(value: Tensor | float | int, world: World) -> Tensor:
    """Sum of a scalar (or small tensor) over ranks, as an fp64 tensor on the world's device, equal on every rank.

    fp64 because sums of token counts and losses over a long run must stay exact to the last token.
    """
    return _all_reduce(value, world, dist.ReduceOp.SUM)


def max_over_ranks(value: Tensor | float | int, world: World) -> Tensor:
    """Maximum of a scalar (or small tensor) over ranks, as an fp64 tensor, equal on every rank."""
    return _all_reduce(value, world, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor | float | int, world: World, op: dist.ReduceOp) -> Tensor:
    total = torch.as_tensor(value, dtype=torch.float64, device=world.device).clone()
    if world.size > 1:  # an axis of a mesh that has one rank has no group of its own
        dist.all_reduce(total, op=op, group=world.group)
    return total


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Pickled by torch: only between ranks of one run."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, value, group=world.group)
    return gathered


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    _all_reduce(0, world, dist.ReduceOp.SUM)
