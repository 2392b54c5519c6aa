"""One bucket: the parameters of a unit that share (storage dtype, wire dtype, trainable?), laid out as one flat tensor.

    full   | w0 ......... |pad| w1 ... |pad| w2 ................ |pad| tail pad |   full_numel, wire dtype, in a buffer
           |        shard of rank 0       |        shard of rank 1              |   shard_numel each, storage dtype

Every parameter starts at a multiple of ALIGN_BYTES, the end is padded so that the N shards are equal, and shard borders
fall wherever they fall, also inside a parameter. Gathering therefore produces the parameters themselves: each one is a
*view* of the gathered buffer, and nothing is copied in or out around the collective (`fully_shard` splits the gathered
tensor into one allocation per parameter, and concatenates gradients again before reducing them).

While its unit is not gathered, a parameter is an expanded NaN scalar: it keeps its shape, dtype and identity, holds no
memory, and using it out of turn gives NaN instead of a plausible number.

Bytes held by a bucket on each of N ranks, with F = full_numel:

    storage shard     F/N · storage itemsize            always
    gradient shard    F/N · 4                           trainable buckets only; frozen ones have no gradient memory
    gathered views    F · wire itemsize, borrowed from a ring slot while the unit is FULL; nothing if `resident`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import collectives
from minift.optim.shard import FlatShard, ParamRange

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
    def plan(cls, shapes: dict[str, torch.Size], world_size: int, itemsize: int) -> FlatLayout:
        """Lay tensors of `shapes` (in this order) one after the other; `itemsize` is the wire dtype's, in bytes."""
        align = max(1, ALIGN_BYTES // itemsize)
        spans, offset = [], 0
        for name, shape in shapes.items():
            spans.append(Span(name, shape, offset))
            offset += _round_up(shape.numel(), align)
        return cls(tuple(spans), _round_up(offset, align * world_size) // world_size, world_size)

    @property
    def full_numel(self) -> int:
        return self.shard_numel * self.world_size

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


class Bucket:
    """The shard, the gathered views and the gradients of one flat group of parameters. No schedule: see `unit`."""

    def __init__(
        self,
        name: str,
        params: dict[str, nn.Parameter],
        storage_dtype: torch.dtype,
        wire_dtype: torch.dtype,
        trainable: bool,
        world: World,
    ) -> None:
        self.name = name
        self.params = params
        self.wire_dtype = wire_dtype
        self.trainable = trainable
        self.world = world
        self.layout = FlatLayout.plan({n: p.shape for n, p in params.items()}, world.size, wire_dtype.itemsize)
        # Zeros, because padding is reduced, gathered and summed into norms along with everything else.
        numel, device = self.layout.shard_numel, world.device
        self.shard = torch.zeros(numel, dtype=storage_dtype, device=device)  # 1-D
        self.grad = torch.zeros(numel, dtype=torch.float32, device=device) if trainable else None  # 1-D
        # A group of one whose storage is what compute reads has nothing to gather: the shard is the full tensor.
        self.resident = world.size == 1 and storage_dtype == wire_dtype
        self._views: dict[int, list[Tensor]] = {}  # buffer address -> one view per parameter
        self._placeholders = [_placeholder(p.shape, wire_dtype, world.device) for p in params.values()]
        self._full: Tensor | None = None  # 1-D, wire dtype, while gathering or gathered
        if self.resident:
            self._full = self.shard
            self.expose()
        else:
            self.hide()

    @property
    def full_bytes(self) -> int:
        """Bytes this bucket needs in a ring slot."""
        return 0 if self.resident else self.layout.full_numel * self.wire_dtype.itemsize

    # Gathering #

    def start_gather(self, buffer: Tensor) -> collectives.Pending:
        """Begin to fill `buffer` (1-D uint8, `full_bytes` long); the own shard is cast on the way in."""
        if self.resident:
            return collectives.DONE
        self._full = buffer.view(self.wire_dtype)
        self._own_chunk(self._full).copy_(self.shard)
        return collectives.all_gather(self._full, self.world)

    def expose(self) -> None:
        """Make the parameters views of the gathered buffer. Views are made once per buffer, not once per gather."""
        assert self._full is not None, f"{self.name}: expose() before start_gather()"
        address = self._full.data_ptr()
        if address not in self._views:
            self._views[address] = [self._full[s.start : s.stop].view(s.shape) for s in self.layout.spans]
        for param, view in zip(self.params.values(), self._views[address], strict=True):
            param.data = view

    def hide(self) -> None:
        """Let go of the gathered buffer; the parameters become placeholders."""
        if self.resident:
            return
        self._full = None
        for param, placeholder in zip(self.params.values(), self._placeholders, strict=True):
            param.data = placeholder

    # Gradients #

    def pack_grads(self, full_grad: Tensor) -> set[str]:
        """Move the parameters' `.grad` into `full_grad` (1-D, reduce dtype, full_numel); return the names that had one.

        Gaps and parameters without a gradient are written as zero: the buffer still holds another unit's values.
        """
        arrived, filled = set(), 0
        for span, param in zip(self.layout.spans, self.params.values(), strict=True):
            full_grad[filled : span.start].zero_()
            if param.grad is None:
                full_grad[span.start : span.stop].zero_()
            else:
                arrived.add(span.name)
                full_grad[span.start : span.stop].view(span.shape).copy_(param.grad)
                param.grad = None
            filled = span.stop
        full_grad[filled:].zero_()
        return arrived

    def accumulate(self, full_grad: Tensor) -> None:
        """Add this rank's chunk of the reduced `full_grad` to the gradient shard."""
        assert self.grad is not None
        self.grad.add_(self._own_chunk(full_grad))

    # Storage #

    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill the shard: `read(name, start, stop)` gives elements [start, stop) of the flattened parameter."""
        for r in self.layout.local_ranges(self.world.rank):
            self.shard[r.start : r.stop].copy_(read(r.name, r.param_start, r.param_start + r.stop - r.start))

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the *storage* (fp32 masters, not their wire copy) and yield (name, tensor). Collective.

        Holds one temporary of full_numel storage elements; the yielded tensors are views of it, valid until the next.
        """
        full = torch.empty(self.layout.full_numel, dtype=self.shard.dtype, device=self.shard.device)
        self._own_chunk(full).copy_(self.shard)
        collectives.all_gather(full, self.world).wait()
        for span in self.layout.spans:
            yield span.name, full[span.start : span.stop].view(span.shape)

    def flat_shard(self) -> FlatShard:
        """What the optimizer updates: master, gradient, and which elements belong to which parameter."""
        assert self.grad is not None, f"{self.name} is frozen"
        return FlatShard(self.name, self.shard, self.grad, self.layout.local_ranges(self.world.rank))

    def _own_chunk(self, full: Tensor) -> Tensor:
        return full.narrow(0, self.world.rank * self.layout.shard_numel, self.layout.shard_numel)


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `shape` that owns one element: NaN, or 0 for packed integer formats (which have no NaN)."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(shape)
