"""Where parameters lie in one flat tensor, and how that is cut into shards: pure arithmetic, no memory.

    full   | w0 ......... |pad| w1 ... |pad| w2 ................ |pad| tail pad |   full_numel
           |        shard of rank 0       |        shard of rank 1              |   shard_numel each

Every parameter starts at a multiple of ALIGN_BYTES, the end is padded so that the N shards are equal, and shard borders
fall wherever they fall, also inside a parameter. (What is kept by blocks of elements needs each block in one shard:
then parameters and shards start at multiples of a block, too.) Gathering therefore produces the parameters themselves:
each one is a *view* of the gathered buffer, and nothing is copied in or out around the collective (`fully_shard` splits
the gathered tensor into one allocation per parameter, and concatenates gradients again before reducing them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.optim.shard import ParamRange

ALIGN_BYTES = 64  # one cache line, one AVX-512 register; a multiple of the 16-byte vector loads of a GPU


@dataclass(frozen=True)
class Span:
    """Where one parameter lies in the full flat tensor, in elements."""

    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


@dataclass(frozen=True)
class FlatLayout:
    """The order, offsets and padding of one flat tensor. A pure function of shapes, so equal on every rank."""

    spans: tuple[Span, ...]
    shard_numel: int
    world_size: int

    @classmethod
    def plan(cls, shapes: dict[str, torch.Size], world_size: int, itemsize: int, block: int = 1) -> FlatLayout:
        """Lay tensors of `shapes` (in this order) one after the other.

        itemsize: the wire dtype's, in bytes. block: elements that no border between shards may separate.
        """
        align = math.lcm(max(1, ALIGN_BYTES // itemsize), block)
        spans, offset = [], 0
        for name, shape in shapes.items():
            spans.append(Span(name, shape, offset))
            offset += _round_up(shape.numel(), align)
        return cls(tuple(spans), _round_up(offset, align * world_size) // world_size, world_size)

    @property
    def full_numel(self) -> int:
        return self.shard_numel * self.world_size

    def views(self, full: Tensor) -> list[Tensor]:
        """The parameters inside of `full` (full_numel,), one view each."""
        return [full[s.start : s.stop].view(s.shape) for s in self.spans]

    def gaps(self) -> list[slice]:
        """What lies in no parameter: alignment and the tail."""
        ends = [0, *(span.stop for span in self.spans)]
        starts = [*(span.start for span in self.spans), self.full_numel]
        return [slice(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def chunk(self, full: Tensor, rank: int) -> Tensor:
        """The shard of `rank` inside of `full`."""
        return full.narrow(0, rank * self.shard_numel, self.shard_numel)

    def local_ranges(self, rank: int) -> list[ParamRange]:
        """Which elements of which parameters lie in the shard of `rank`."""
        shard_start, ranges = rank * self.shard_numel, []
        for span in self.spans:
            start, stop = max(span.start, shard_start), min(span.stop, shard_start + self.shard_numel)
            if start < stop:
                ranges.append(
                    ParamRange(
                        span.name, start - shard_start, stop - shard_start, start - span.start, tuple(span.shape)
                    )
                )
        return ranges


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
