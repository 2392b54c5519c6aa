"""Host memory that a GPU copies from and to while both go on: page-locked, and of the size that was asked for.

PyTorch's pinned memory is made to be lent again and again, and rounds sizes up to a power of two for that (the classes
of c10's CachingHostAllocator): of what stays, shards and moments, it would waste up to half. A block of Llama-3.1-8B in
bf16 takes 416 MiB here, and 512 there; of the 70B, 1.59 GiB instead of 2. Not here: what comes and goes (inputs of
blocks, pieces of checkpoints), for which lending is right.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def pinned_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """1-D, zeros. RuntimeError if CUDA has none: the host lacks memory, or may not lock it."""
    if numel == 0:
        return torch.zeros(0, dtype=dtype)
    return torch.frombuffer(_LockedPages(numel * dtype.itemsize), dtype=dtype)


class _LockedPages(mmap.mmap):
    """Pages that nothing else lies in, known to CUDA for as long as they are there."""

    address: int | None = None
    device: int  # whose stream may be copying when the pages go

    def __new__(cls, num_bytes: int) -> _LockedPages:
        return super().__new__(cls, -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, num_bytes: int) -> None:
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        self.madvise(mmap.MADV_DONTFORK)  # else a fork may leave the GPU with pages that are the child's
        self.device = torch.cuda.current_device()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        self.address = address

    def __del__(self) -> None:
        """Before the pages go. Copies may be under way that nobody waited for."""
        if self.address is not None:
            torch.cuda.synchronize(self.device)  # not the current one of whichever thread collects garbage
            torch.cuda.cudart().cudaHostUnregister(self.address)
