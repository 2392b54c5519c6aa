"""All-gather and reduce-scatter of flat tensors, each as the fastest primitives of its backend do it.

Both work on *full* tensors: `world.size` equal chunks, of which chunk `rank` is this process's. All-gather fills the
other chunks, whose owners have filled their own; reduce-scatter adds up everybody's chunk `rank` and leaves the other
chunks as garbage. The tensors lie in a `Buffer` of the transport, several (the buckets of a unit) in one.

| transport       | where                | gather                        | reduce                                   |
|-----------------|----------------------|-------------------------------|------------------------------------------|
| `Transport`     | a group of one       | nothing                       | nothing                                  |
| `NcclTransport` | a GPU per process    | all_gather_into_tensor        | reduce_scatter_tensor, in the dtype sent |
| `PairedSends`   | gloo                 | a send and a receive per peer | the same, the receiver adds up in fp32   |
| `SharedMemory`  | gloo, CPU, one host  | write the own chunk, signal   | signal, read all chunks, add up in fp32  |

[Note: gloo] gloo's ring all-gather stages everything through fresh buffers, and its reduce-scatter is an all-reduce in
disguise: 2.1 to 2.7 times slower than sends into preallocated memory. Since those carry every addend separately,
gradients travel in the dtype in which they were computed, half the bytes of fp32, and the sum is fp32 all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from minift.dist.collectives import barrier
from minift.dist.process import World

_SUM_BLOCK_ELEMENTS = 1 << 16  # summed chunk by chunk inside of a core's cache
PIECE_ELEMENTS = 1 << 22
"""Between a GPU and its host at a time, where a tensor is made of it on the way: 16 MiB of fp32."""


class NoRoomError(RuntimeError):
    """A transport has no memory of the kind that it needs; on all ranks alike."""


class Buffer:
    """Bytes in which tensors are gathered or reduced; lent from `acquire` until `release`."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # 1-D uint8

    @property
    def num_bytes(self) -> int:
        """All that it takes of this rank's memory."""
        return self.memory.nbytes

    def acquire(self) -> None:
        """Before the first write: make sure that nobody reads what was there before."""

    def release(self) -> None:
        """After the last read."""


@dataclass
class Pending:
    """A collective under way. `wait()` returns when its result may be read (on CUDA: by work given to the same
    stream).
    """

    works: list[dist.Work] = field(default_factory=list)
    finish: Callable[[], None] | None = None

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        if self.finish is not None:
            self.finish()


DONE = Pending()


class Transport:
    """The group of one, and the interface. Every method is called by all ranks in the same order."""

    shares_memory = False
    """Whether a gathered buffer is one piece of memory that all ranks see."""

    sums_in_fp32 = True
    """Whether sums are formed in fp32 whatever dtype the gradients are sent in."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sent_bytes = 0
        """Bytes that this rank has sent to others since the beginning; the same on every rank."""

    def gather_buffers(self, count: int, num_bytes: int) -> list[Buffer]:
        """`count` buffers for all-gathers of at most `num_bytes`."""
        return [self._private_buffer(num_bytes) for _ in range(count)]

    def reduce_buffers(self, count: int, num_bytes: int) -> list[Buffer]:
        """`count` buffers for reduce-scatters of at most `num_bytes`."""
        return [self._private_buffer(num_bytes) for _ in range(count)]

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        """Fill every chunk of each of `fulls` (1-D, any dtype, in `buffer`) from its owner."""
        return DONE

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        """For each of `fulls` (1-D float, in `buffer`): the sum over ranks of chunk `rank` goes into `outs` (fp32,
        chunk sized), added to what is there if `accumulate`. `outs` may be that chunk itself.
        """
        for full, out in zip(fulls, outs, strict=True):
            sum_chunks_(out, full, [], accumulate)
        return DONE

    def meet(self) -> None:
        """Wait until every rank is here."""
        barrier(self.world)

    def _private_buffer(self, num_bytes: int) -> Buffer:
        return Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=self.world.device))

    def _own_chunk(self, full: Tensor) -> Tensor:
        return full.chunk(self.world.size)[self.world.rank]


class NcclTransport(Transport):
    """Collectives on the current stream; the host never waits. (GPU tensors may go over gloo too: slow, for tests.)"""

    sums_in_fp32 = False

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        for full in fulls:
            dist.all_gather_into_tensor(full, self._own_chunk(full), group=self.world.group)
            self.sent_bytes += self._own_chunk(full).nbytes * (self.world.size - 1)
        return DONE

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        for full, out in zip(fulls, outs, strict=True):
            own = self._own_chunk(full)
            dist.reduce_scatter_tensor(own, full, group=self.world.group)
            self.sent_bytes += own.nbytes * (self.world.size - 1)
            sum_chunks_(out, own, [], accumulate)
        return DONE


class _StagedBuffer(Buffer):
    """For reduce-scatter by paired sends: memory, and as much again (less the own chunk) for what the others send."""

    def __init__(self, memory: Tensor, staging: Tensor) -> None:
        super().__init__(memory)
        self.staging = staging

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes + self.staging.nbytes


class PairedSends(Transport):
    """Sends and receives between every two ranks, into memory allocated once. See [Note: gloo]."""

    def reduce_buffers(self, count: int, num_bytes: int) -> list[Buffer]:
        others_bytes = num_bytes // self.world.size * (self.world.size - 1)
        return [
            _StagedBuffer(self._private_buffer(num_bytes).memory, self._private_buffer(others_bytes).memory)
            for _ in range(count)
        ]

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        works: list[dist.Work] = []
        for full in fulls:
            chunks = full.chunk(self.world.size)
            works += self._exchange([chunks[self.world.rank]] * self.world.size, chunks)
        return Pending(works)

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        assert isinstance(buffer, _StagedBuffer)
        works: list[dist.Work] = []
        staged: list[list[Tensor]] = []
        offset = 0
        for full in fulls:
            chunks = full.chunk(self.world.size)
            size = chunks[0].nbytes
            received = list(chunks)  # by rank; the own chunk stands for itself
            for peer in self._others():
                received[peer] = buffer.staging[offset : offset + size].view(full.dtype)
                offset += size
            works += self._exchange(chunks, received)
            staged.append([received[peer] for peer in self._others()])

        def add_up() -> None:
            for full, out, others in zip(fulls, outs, staged, strict=True):
                sum_chunks_(out, self._own_chunk(full), others, accumulate)

        return Pending(works, add_up)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world.size) if rank != self.world.rank]

    def _exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> list[dist.Work]:
        """Post a receive from and a send to every other rank, in the same order on all of them. Receives come first:
        posting one tells the peer that it may send, by a note on the connection that a send would fill for as long as
        its data takes. Behind that, the two directions would be used one after the other."""
        world = self.world
        works: list[dist.Work] = []
        for distance in range(1, world.size):
            peer = (world.rank - distance) % world.size
            works.append(dist.irecv(receive[peer], group=world.group, group_src=peer))
        for distance in range(1, world.size):
            peer = (world.rank + distance) % world.size
            works.append(dist.isend(send[peer], group=world.group, group_dst=peer))
            self.sent_bytes += send[peer].nbytes
        return works


def sum_chunks_(out: Tensor, own: Tensor, others: list[Tensor], accumulate: bool) -> None:
    """out (+)= own + others, in out's dtype and in this order, so that the result does not depend on who arrived first.

    `out` may be `own`: then it is summed up in place. Where it is in host memory and `own` is not, the sum arrives with
    the stream's work.
    """
    in_place = out.data_ptr() == own.data_ptr()
    adds_at_once = not in_place and not accumulate and len(others) > 0 and own.dtype == out.dtype
    block = _SUM_BLOCK_ELEMENTS if own.device.type == "cpu" else max(1, out.numel())
    if out.device != own.device:
        block = PIECE_ELEMENTS
    for start in range(0, out.numel(), block):
        here = slice(start, start + block)
        if adds_at_once:
            torch.add(own[here], others[0][here], out=out[here])
        elif accumulate and not in_place and out.device != own.device:
            # Offloaded: the sum is formed on the device, for the host would have to wait for its part of it.
            total = out[here].to(own.device, non_blocking=True).add_(own[here])
            out[here].copy_(total, non_blocking=True)
        elif accumulate and not in_place:
            out[here].add_(own[here])
        elif not in_place:
            out[here].copy_(own[here], non_blocking=True)
        for other in others[1:] if adds_at_once else others:
            out[here].add_(other[here])
