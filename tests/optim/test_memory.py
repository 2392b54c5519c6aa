"""Paged moments: they can leave memory, and the updates are those of resident ones, bit for bit."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.optim import memory
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.memory import PinnedHost, moments_memory
from minift.optim.shard import FlatShard, ParamRange
from tests.optim import eight_bit

CPU = torch.device("cpu")
MS_SYNC, MADV_PAGEOUT = 4, 21
states = pytest.mark.parametrize("state", ["fp32", "8bit"])


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that the tensor lies in."""
    mapping = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in found.groups())
            mapping = begin <= tensor.data_ptr() < end
        elif mapping and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor is in no mapping")


@pytest.fixture
def page_out() -> Callable[[torch.Tensor], None]:
    """What the kernel does when memory is short: write the pages back and take them away."""
    with mmap.mmap(-1, mmap.PAGESIZE) as probe:
        try:
            probe.madvise(MADV_PAGEOUT)
        except OSError as error:
            pytest.skip(f"this kernel cannot page out on request ({error})")
    libc = ctypes.CDLL(None, use_errno=True)

    def page_out(tensor: torch.Tensor) -> None:
        address, length = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        for failed in (libc.msync(address, length, MS_SYNC), libc.madvise(address, length, MADV_PAGEOUT)):
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return page_out


@states
def test_moments_leave_memory_between_steps_and_no_bit_changes(state: str, page_out) -> None:
    """8 MiB of weights. After every step the kernel does what a spike of memory makes it do."""
    n = 1 << 21
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator)
    shards = [FlatShard("s", start.clone(), torch.zeros(n), [ParamRange("w", 0, n, 0, (n,))]) for _ in range(2)]
    resident, paged = (
        AdamW([shard], OptimConfig(lr=1e-2, state=state, paged=is_paged))
        for shard, is_paged in zip(shards, (False, True), strict=True)
    )
    for _ in range(3):
        gradient = torch.randn(n, generator=generator)
        for optimizer in (resident, paged):
            optimizer.shards[0].grad.copy_(gradient)
            optimizer.step(1.0)
        for tensor in paged.state_dict()["s"].values():
            if tensor.nbytes >= 1 << 20:
                assert resident_bytes(tensor) >= tensor.nbytes
                page_out(tensor)
                assert resident_bytes(tensor) <= tensor.nbytes // 20
    assert torch.equal(shards[0].master, shards[1].master)
    for what, tensor in resident.state_dict()["s"].items():
        assert torch.equal(tensor, paged.state_dict()["s"][what])


MIB = 1 << 20
SPIKE_BYTES = 128 * MIB
WEIGHTS = 9 << 20  # 36 MiB a tensor in fp32: more than what malloc ever keeps when it is freed


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Private memory beyond what the process has now; what the kernel can write back to a file does not count."""
    status = Path("/proc/self/status").read_text()
    now = int(re.search(r"VmData:\s+(\d+) kB", status).group(1)) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def spike() -> None:
    """Raises RuntimeError if there is no memory for it."""
    torch.ones(SPIKE_BYTES, dtype=torch.uint8)  # every page is written


def steps_with(shard: FlatShard, start: torch.Tensor, config: OptimConfig, between_steps) -> AdamW:
    shard.master.copy_(start)
    optimizer = AdamW([shard], config)
    for number in range(2):
        torch.randn(shard.grad.shape, generator=torch.Generator().manual_seed(number), out=shard.grad)
        optimizer.step(1.0)
        between_steps()
    return optimizer


@states
def test_a_spike_that_leaves_no_room_for_resident_moments(state: str) -> None:
    """In a process of its own: malloc has kept nothing in it that earlier tests have freed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        fresh.submit(meet_the_spike, state).result()


def meet_the_spike(state: str) -> None:
    """There is memory for the spike and half of the fp32 moments. With paged ones the steps are the same to the bit."""
    start = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(9))
    shard = FlatShard("s", start.clone(), torch.zeros(WEIGHTS), [ParamRange("w", 0, WEIGHTS, 0, (WEIGHTS,))])
    config = {"lr": 1e-2, "state": state}
    resident = steps_with(shard, start, OptimConfig(**config), spike)
    exact = shard.master.clone(), resident.state_dict()["s"]
    with room_for(SPIKE_BYTES + 4 * WEIGHTS):
        paged = steps_with(shard, start, OptimConfig(**config, paged=True), spike)
        assert torch.equal(shard.master, exact[0])
        if state == "fp32":
            with pytest.raises(RuntimeError, match="allocate memory"):
                steps_with(shard, start, OptimConfig(**config), spike)
    for what, tensor in exact[1].items():
        assert torch.equal(tensor, paged.state_dict()["s"][what])


@states
@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_updates_are_those_of_resident_moments(state: str, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(eight_bit.TOTAL, generator=generator)
    resident, paged = (
        eight_bit.optimizers(flat, 2, OptimConfig(lr=1e-2, weight_decay=0.1, state=state, paged=is_paged), dtype)
        for is_paged in (False, True)
    )
    for _ in range(2):
        gradient = torch.randn(eight_bit.TOTAL, generator=generator)
        for ranks in (resident, paged):
            eight_bit.step(ranks, gradient, grad_factor=0.5)
    assert eight_bit.same(eight_bit.whole(resident), eight_bit.whole(paged))


def test_the_file_has_no_name_and_ends_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.tempfile, "tempdir", str(tmp_path))
    tensor = moments_memory(CPU, paged=True).zeros(1000, torch.float32)
    assert len(tensor) == 1000 and not tensor.any() and not list(tmp_path.iterdir())
    assert f"{tmp_path}/minift-moments-" in Path("/proc/self/maps").read_text()
    del tensor
    assert f"{tmp_path}/minift-moments-" not in Path("/proc/self/maps").read_text()


def test_a_disk_without_room_is_noticed_at_once() -> None:
    with pytest.raises(OSError, match=r"optim.paged needs \d+ MiB more in .*valid: a folder"):
        moments_memory(CPU, paged=True).zeros(1 << 50, torch.uint8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@states
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_updates_moments_on_the_host_to_the_same_bits(state: str, dtype: torch.dtype, monkeypatch) -> None:
    """In more pieces than there are buffers."""
    monkeypatch.setattr(PinnedHost, "piece_elements", 512)
    device = torch.device("cuda", 0)
    flat, config = torch.randn(eight_bit.TOTAL, device=device), {"lr": 1e-2, "weight_decay": 0.1, "state": state}
    resident, paged = (
        eight_bit.optimizers(flat, 1, OptimConfig(**config, paged=is_paged), dtype) for is_paged in (False, True)
    )
    for _ in range(4):
        gradient = torch.randn(eight_bit.TOTAL, device=device)
        for ranks in (resident, paged):
            eight_bit.step(ranks, gradient, grad_factor=0.5)
    assert all(tensor.is_pinned() for tensor in paged[0].state_dict()["all"].values() if tensor.numel())
    ours, exact = eight_bit.whole(paged), eight_bit.whole(resident)
    assert eight_bit.same(
        ours, {n: {what: t.to(ours[n][what].device) for what, t in s.items()} for n, s in exact.items()}
    )
