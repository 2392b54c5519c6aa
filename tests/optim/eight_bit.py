"""Parameters of odd shapes in flat shards that are cut where blocks end, as `fsdp.flat` cuts them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minift.ops.blockwise import BLOCK
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

# Two that are quantised on the sides of one that is not; two in a row, with padding within a block between them.
SHAPES = {
    "a.weight": (67, 83),
    "a.norm.weight": (300,),
    "b.weight": (4096,),
    "b.bias": (7,),
    "c.weight": (67, 64),
    "d.weight": (64, 64),
}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def starts() -> dict[str, int]:
    """Where each parameter begins in the flat tensor of all."""
    found, at = {}, 0
    for name, shape in SHAPES.items():
        found[name], at = at, at + round_up(math.prod(shape), BLOCK)
    return found


TOTAL = sum(round_up(math.prod(shape), BLOCK) for shape in SHAPES.values())


def flatten(values: dict[str, Tensor]) -> Tensor:
    """All parameters with padding between them: (TOTAL,)."""
    flat = torch.zeros(TOTAL)
    for name, start in starts().items():
        flat[start : start + values[name].numel()] = values[name].flatten()
    return flat


def make_shards(flat: Tensor, world_size: int, dtype: torch.dtype = torch.float32) -> list[FlatShard]:
    """The shards of all ranks, equal pieces."""
    size = round_up(TOTAL, BLOCK * world_size) // world_size
    padded = torch.nn.functional.pad(flat, (0, size * world_size - TOTAL))
    shards = []
    for rank in range(world_size):
        begin, end, ranges = rank * size, (rank + 1) * size, []
        for name, start in starts().items():
            low, high = max(begin, start), min(end, start + math.prod(SHAPES[name]))
            if low < high:
                ranges.append(ParamRange(name, low - begin, high - begin, low - start, SHAPES[name]))
        shards.append(FlatShard("all", padded[begin:end].to(dtype), torch.zeros(size, device=flat.device), ranges))
    return shards


def optimizers(flat: Tensor, world_size: int, config: OptimConfig, dtype: torch.dtype = torch.float32) -> list[AdamW]:
    """One for each rank."""
    return [AdamW([shard], config) for shard in make_shards(flat, world_size, dtype)]


def step(ranks: list[AdamW], gradient: Tensor, grad_factor: float | Tensor = 1.0) -> None:
    """One step of all ranks with the flat gradient (TOTAL,)."""
    size = len(ranks[0].shards[0].grad)
    padded = torch.nn.functional.pad(gradient, (0, size * len(ranks) - TOTAL))
    for rank, optimizer in enumerate(ranks):
        optimizer.shards[0].grad.copy_(padded[rank * size : (rank + 1) * size])
        optimizer.step(1.0, grad_factor)


def whole(ranks: list[AdamW]) -> dict[str, dict[str, Tensor]]:
    """Parameter -> "master" and its states -> the whole of it, put together from all ranks."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for optimizer in ranks:
        for shard in optimizer.shards:
            tensors = optimizer.state_dict()[shard.name]
            for piece in shard.ranges:
                parts = {what: tensors[what][p.start : p.stop] for what, p in optimizer.places(shard, piece).items()}
                parts["master"] = shard.master[piece.start : piece.stop]
                for what, part in parts.items():
                    found.setdefault(piece.name, {}).setdefault(what, []).append(part)
    return {name: {what: torch.cat(parts) for what, parts in state.items()} for name, state in found.items()}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(torch.equal(a[name][what], b[name][what]) for what in a[name])
        for name in a
    )
