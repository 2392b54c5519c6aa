"""Collectives of processes on one host through memory that all of them have mapped: nothing is sent.

A gathered buffer is one piece of memory for all ranks. To gather, every rank copies its shard to its chunk and says
so; when all have, everybody reads all of it. To reduce, every rank leaves its gradients where they were computed and
says so; when all have, everybody reads chunk `rank` of each. So an all-gather moves 1/N of the bytes once (the copy),
and N ranks hold one gathered copy instead of N.

Two counters per buffer and rank order it, g being how often the buffer has been lent:

    acquire      wait until released[all] = g - 1      nobody reads the previous contents any more
    signal       written[own] = g                      my part is there (or: my gradients are)
    wait         wait until written[all] = g
    release      released[own] = g                     I read no more of it

All ranks lend the same buffers in the same order, so nothing else has to be agreed upon.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
import uuid
from pathlib import Path

import torch
from torch import Tensor

from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.fsdp.transport import Buffer, NoRoomError, Pending, Transport, sum_chunks_
from minift.ops.flags import AVAILABLE, set_flag, wait_flags

_FOLDER = Path("/dev/shm")
_PAGE_BYTES = 4096
_LOOK_AFTER_PEERS_MS = 1000  # how often a waiting rank makes sure that the others still live
_GIVE_UP_S = 600.0


class SharedMemory(Transport):
    """Made by `connect`, which decides whether this can work here."""

    shares_memory = True

    def __init__(self, world: World, process_ids: list[int]) -> None:
        super().__init__(world)
        self._process_ids = process_ids

    @classmethod
    def connect(cls, world: World) -> SharedMemory | None:
        """None, on all ranks alike, unless all ranks are CPU processes of one host that can map the same file."""
        possible = AVAILABLE and world.device.type == "cpu" and _FOLDER.is_dir()
        places = gather_objects((possible, socket.gethostname(), os.getpid(), _namespace()), world)
        if not all(place[0] for place in places) or len({(place[1], place[3]) for place in places}) > 1:
            return None
        transport = cls(world, [place[2] for place in places])
        return transport if transport._map(_PAGE_BYTES) is not None else None

    def gather_buffers(self, count: int, num_bytes: int) -> list[Buffer]:
        return self._buffers(count, num_bytes, copies=1)

    def reduce_buffers(self, count: int, num_bytes: int) -> list[Buffer]:
        return self._buffers(count, num_bytes, copies=self.world.size)

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        assert isinstance(buffer, _SharedBuffer)
        buffer.signal()
        return Pending(finish=buffer.wait)

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        assert isinstance(buffer, _SharedBuffer)
        buffer.signal()

        def add_up() -> None:
            buffer.wait()
            for full, out in zip(fulls, outs, strict=True):
                start = full.data_ptr() - buffer.memory.data_ptr()
                theirs = [m[start : start + full.nbytes].view(full.dtype) for m in buffer.others()]
                sum_chunks_(out, self._own_chunk(full), [self._own_chunk(full) for full in theirs], accumulate)

        return Pending(finish=add_up)

    def wait_until(self, flags_N: Tensor, value: int) -> None:
        """RuntimeError if a rank dies meanwhile, or nothing happens for too long."""
        started = time.monotonic()
        while not wait_flags(flags_N, value, _LOOK_AFTER_PEERS_MS):
            for rank, process_id in enumerate(self._process_ids):
                if not _is_alive(process_id):
                    raise RuntimeError(f"rank {rank} of this shard group (process {process_id}) has died")
            if time.monotonic() - started > _GIVE_UP_S:
                behind = [rank for rank, flag in enumerate(flags_N.tolist()) if flag < value]
                raise RuntimeError(f"waited {_GIVE_UP_S:.0f} s for ranks {behind}: they are busy elsewhere, or stuck")

    def _buffers(self, count: int, num_bytes: int, copies: int) -> list[Buffer]:
        """Per buffer: a page of counters, then `copies` pieces of memory."""
        size = self.world.size
        flag_bytes, piece_bytes = _page_aligned(2 * size * 8), _page_aligned(num_bytes)
        buffer_bytes = flag_bytes + copies * piece_bytes
        if count == 0 or num_bytes == 0:
            return [Buffer(torch.empty(0, dtype=torch.uint8)) for _ in range(count)]
        segment = self._map(count * buffer_bytes)
        if segment is None:
            raise NoRoomError(
                f"{_FOLDER} has no room for {count * buffer_bytes / 2**20:.0f} MiB of shared buffers; make it larger "
                "(in a container: --shm-size)"
            )
        buffers: list[Buffer] = []
        for start in range(0, count * buffer_bytes, buffer_bytes):
            flags_2N = segment[start : start + 2 * size * 8].view(torch.int64).view(2, size)
            pieces = segment[start + flag_bytes : start + buffer_bytes].view(copies, piece_bytes)[:, :num_bytes]
            buffers.append(_SharedBuffer(self, pieces, flags_2N))
        return buffers

    def _map(self, num_bytes: int) -> Tensor | None:
        """Zeroed memory that all ranks see, 1-D uint8; None, on all ranks, if one of them cannot. Collective."""
        path = _FOLDER / f"minift-{uuid.uuid4().hex}"
        memory = None
        try:
            failed = False
            if self.world.rank == 0:
                failed = not _make_file(path, num_bytes)
            name, failed = gather_objects((path.name, failed), self.world)[0]
            if not failed:
                try:
                    with open(_FOLDER / name, "r+b") as file:
                        memory = torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8)
                except OSError:
                    memory = None
            all_mapped = all(gather_objects(memory is not None, self.world))
        finally:
            path.unlink(missing_ok=True)  # the mappings stay; nothing is left behind by a process that is killed
        return memory if all_mapped else None


class _SharedBuffer(Buffer):
    """pieces (copies, bytes) uint8: one for all ranks, or one each. flags_2N: written and released."""

    def __init__(self, transport: SharedMemory, pieces: Tensor, flags_2N: Tensor) -> None:
        rank = transport.world.rank
        super().__init__(pieces[rank if len(pieces) > 1 else 0])
        self._transport = transport
        self._rank = rank
        self._pieces = pieces
        self._written_N, self._released_N = flags_2N
        self._times_lent = 0

    def acquire(self) -> None:
        self._transport.wait_until(self._released_N, self._times_lent)
        self._times_lent += 1

    def signal(self) -> None:
        set_flag(self._written_N, self._rank, self._times_lent)

    def wait(self) -> None:
        self._transport.wait_until(self._written_N, self._times_lent)

    def release(self) -> None:
        set_flag(self._released_N, self._rank, self._times_lent)

    def others(self) -> list[Tensor]:
        """The other ranks' memory, ascending."""
        return [piece for rank, piece in enumerate(self._pieces) if rank != self._rank]


def _make_file(path: Path, num_bytes: int) -> bool:
    """Reserve the memory now: a write to a page that cannot be had would kill the process."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _namespace() -> str:
    """Which process numbers are meant: those of this container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_alive(process_id: int) -> bool:
    """False for a process that is gone, and for one that is dead but not buried by its parent."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
