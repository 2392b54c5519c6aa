"""All-gather and reduce-scatter of both gloo transports. Oracle: what every rank contributed, added up in fp64."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import shared_memory
from minift.fsdp.sharded import connect
from minift.fsdp.shared_memory import SharedMemory
from tests.fsdp.trees import connect_by
from tests.ranks import run_ranks

ROUNDS = 5  # enough to lend every buffer several times


def contribution(rank: int, round_: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + round_)
    return torch.randn(numel, generator=generator).to(dtype)


def gather_on_rank(world: World, transport: str, chunk_numels: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Rounds of all-gathers of several tensors in one buffer, two buffers in turn, one round ahead."""
    link = connect_by(transport, world)
    sizes = [n * world.size * dtype.itemsize for n in chunk_numels]
    buffers = link.gather_buffers(2, sum(sizes))
    results: list[list[Tensor]] = []
    under_way: list[tuple] = []

    def finish() -> None:
        buffer, fulls, pending = under_way.pop(0)
        pending.wait()
        results.append([full.clone() for full in fulls])
        buffer.release()

    for round_ in range(ROUNDS):
        if len(under_way) == 2:
            finish()
        buffer = buffers[round_ % 2]
        buffer.acquire()
        fulls = [part.view(dtype) for part in buffer.memory.split(sizes)]
        for full, numel in zip(fulls, chunk_numels, strict=True):
            full.view(world.size, numel)[world.rank] = contribution(world.rank, round_, numel, dtype)
        under_way.append((buffer, fulls, link.all_gather(buffer, fulls)))
    while under_way:
        finish()
    return results


@settings(max_examples=25, deadline=None, phases=(Phase.generate,))
@given(
    world_size=st.integers(1, 4),
    transport=st.sampled_from(["shared", "paired"]),
    chunk_numels=st.lists(st.integers(1, 40).map(lambda n: 16 * n), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]),
)
def test_all_gather(world_size: int, transport: str, chunk_numels: list[int], dtype: torch.dtype) -> None:
    expected = [
        [torch.cat([contribution(r, round_, n, dtype) for r in range(world_size)]) for n in chunk_numels]
        for round_ in range(ROUNDS)
    ]
    for results in run_ranks(world_size, gather_on_rank, transport, chunk_numels, dtype):
        for round_, fulls in enumerate(results):
            assert all(torch.equal(full, e) for full, e in zip(fulls, expected[round_], strict=True))


def reduce_on_rank(
    world: World, transport: str, chunk_numel: int, dtype: torch.dtype, in_place: bool, accumulate: bool
) -> Tensor:
    """Rounds of reduce-scatters, two buffers in turn, the older one finished when a third is needed."""
    link = connect_by(transport, world)
    numel = chunk_numel * world.size
    buffers = link.reduce_buffers(2, numel * dtype.itemsize)
    outs: list[Tensor] = []
    under_way: list[tuple] = []

    def finish() -> None:
        buffer, out, pending = under_way.pop(0)
        pending.wait()
        outs.append(out.clone())
        buffer.release()

    for round_ in range(ROUNDS):
        if len(under_way) == 2:
            finish()
        buffer = buffers[round_ % 2]
        buffer.acquire()
        full = buffer.memory.view(dtype)
        full.copy_(contribution(world.rank, round_, numel, dtype))
        out = full.chunk(world.size)[world.rank] if in_place else torch.ones(chunk_numel)
        under_way.append((buffer, out, link.reduce_scatter(buffer, [full], [out], accumulate)))
    while under_way:
        finish()
    return torch.stack(outs)


@settings(max_examples=30, deadline=None, phases=(Phase.generate,))
@given(
    world_size=st.integers(1, 4),
    transport=st.sampled_from(["shared", "paired"]),
    chunk_numel=st.sampled_from([16, 48, 1 << 16, (1 << 16) + 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    in_place=st.booleans(),
    accumulate=st.booleans(),
)
def test_reduce_scatter(
    world_size: int, transport: str, chunk_numel: int, dtype: torch.dtype, in_place: bool, accumulate: bool
) -> None:
    """Sums are fp32 whatever is sent: at most 4 additions of values below 6, so an error of 4 · 24 · 2⁻²⁴ < 1e-5."""
    if in_place:
        dtype, accumulate = torch.float32, False
    numel = chunk_numel * world_size
    for rank, outs in enumerate(
        run_ranks(world_size, reduce_on_rank, transport, chunk_numel, dtype, in_place, accumulate)
    ):
        for round_, out in enumerate(outs):
            total = sum(contribution(r, round_, numel, dtype).double() for r in range(world_size))
            expected = total.chunk(world_size)[rank] + (1.0 if accumulate else 0.0)
            assert (out - expected).abs().max() < 1e-5


def transport_on_rank(world: World, has_folder: bool, has_room: bool) -> str:
    """What `connect` chooses when rank 1 lacks something."""
    folder, make_file = shared_memory._FOLDER, shared_memory._make_file
    try:
        if not has_folder and world.rank == 1:
            shared_memory._FOLDER = Path("/no/such/folder")
        if not has_room:
            shared_memory._make_file = lambda path, num_bytes: False
        return type(connect(world)).__name__
    finally:
        shared_memory._FOLDER, shared_memory._make_file = folder, make_file


def test_all_ranks_choose_the_same_transport() -> None:
    assert run_ranks(1, transport_on_rank, True, True) == ["Transport"]
    assert run_ranks(3, transport_on_rank, True, True) == ["SharedMemory"] * 3
    assert run_ranks(3, transport_on_rank, False, True) == ["PairedSends"] * 3
    assert run_ranks(3, transport_on_rank, True, False) == ["PairedSends"] * 3


def full_folder_on_rank(world: World) -> str:
    link = SharedMemory.connect(world)
    assert link is not None
    make_file, shared_memory._make_file = shared_memory._make_file, lambda path, num_bytes: False
    try:
        with pytest.raises(RuntimeError) as caught:
            link.gather_buffers(1, 5 << 20)
    finally:
        shared_memory._make_file = make_file
    return str(caught.value)


def test_no_room_for_buffers_is_said_on_all_ranks() -> None:
    for message in run_ranks(2, full_folder_on_rank):
        assert "no room" in message and "--shm-size" in message


def make_buffers_in(world: World, folder: Path) -> int:
    ordinary, shared_memory._FOLDER = shared_memory._FOLDER, folder
    try:
        link = SharedMemory.connect(world)
        assert link is not None
        return len(link.gather_buffers(2, 1000))
    finally:
        shared_memory._FOLDER = ordinary


def test_no_file_is_left_behind(tmp_path: Path) -> None:
    assert run_ranks(2, make_buffers_in, tmp_path) == [2, 2]
    assert list(tmp_path.iterdir()) == []


def waits_for_a_dead_peer(world: World) -> str:
    """Rank 0 waits for a process that has died without being buried."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    link = SharedMemory(world, [os.getpid(), child.pid])
    child.send_signal(signal.SIGKILL)
    try:
        with pytest.raises(RuntimeError) as caught:
            link.wait_until(torch.zeros(2, dtype=torch.int64), 1)
        return str(caught.value)
    finally:
        child.wait()


def test_waiting_for_a_dead_process_is_an_error() -> None:
    (message,) = run_ranks(1, waits_for_a_dead_peer)
    assert message.startswith("rank 1 of this shard group") and message.endswith("has died")


def posted_on_rank(world: World) -> list[str]:
    posted: list[str] = []
    for name in ("irecv", "isend"):
        function = getattr(dist, name)

        def post(*args, name: str = name, function=function, **keywords) -> dist.Work:
            posted.append(name)
            return function(*args, **keywords)

        setattr(dist, name, post)
    link = connect_by("paired", world)
    (buffer,) = link.gather_buffers(1, 64 * world.size)
    link.all_gather(buffer, [buffer.memory.view(torch.float32)]).wait()
    return posted


def test_receives_are_posted_before_a_send_fills_the_connection() -> None:
    """Else a peer is told that it may send behind the data that go the other way, and takes as long again."""
    for posted in run_ranks(3, posted_on_rank):
        assert posted == ["irecv", "irecv", "isend", "isend"]
