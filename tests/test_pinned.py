"""Pinned memory of the size that was asked for. Oracle: a runtime that keeps a list, where there is no GPU; what
PyTorch says of memory, where there is one."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.pinned import pinned_zeros

DTYPES = [torch.uint8, torch.int16, torch.bfloat16, torch.float32]


class Runtime:
    """What is registered, {address: bytes}; as CUDA does, refuses pages that are."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.num_registered = 0
        self.error = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        for other, size in self.registered.items():
            assert address + num_bytes <= other - other % mmap.PAGESIZE or other + size <= address, "one page, twice"
        if not self.error:
            self.registered[address] = num_bytes
            self.num_registered += 1
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        num_bytes = self.registered.pop(address)
        ctypes.string_at(address, num_bytes)  # would end the process if the pages were gone
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    def check_error(error: int) -> None:
        if error:
            raise RuntimeError(f"CUDA error {error}")

    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    yield found
    assert not found.registered and waited == [3] * found.num_registered


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(DTYPES)), max_size=6))
def test_all_of_it_is_registered_for_as_long_as_it_is_there(runtime: Runtime, asked) -> None:
    tensors = [pinned_zeros(numel, dtype) for numel, dtype in asked]
    assert [(*t.shape, t.dtype) for t in tensors] == asked and not any(t.any() for t in tensors)
    sizes = {t.data_ptr(): t.nbytes for t in tensors if t.numel()}
    assert runtime.registered == sizes and all(address % mmap.PAGESIZE == 0 for address in sizes)
    views = [t.fill_(7)[1:] for t in tensors]
    tensors.clear()
    assert runtime.registered == sizes  # of which a view is left
    while views:
        address = views[-1].data_ptr() - views[-1].itemsize
        assert views[-1].eq(7).all()
        views.pop()
        assert address not in runtime.registered


def test_memory_that_cuda_does_not_lock_is_an_error(runtime: Runtime) -> None:
    runtime.error = 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        pinned_zeros(100, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_from_and_to_it() -> None:
    host, back = pinned_zeros(3 << 20, torch.float32), pinned_zeros(3 << 20, torch.float32)
    assert host.is_pinned() and host[5:].is_pinned()
    host.copy_(torch.randn(len(host)))
    device = host.to("cuda", non_blocking=True)
    back.copy_(device, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert torch.equal(back, host)
