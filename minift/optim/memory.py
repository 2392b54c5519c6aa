"""Where the moments lie: on the device, or paged (`optim.paged`).

Paged moments are on the host, so that a spike of memory meets weights and gradients alone, and come to where they are
needed piece by piece, while an update is under way. The arithmetic and its order per element are those of resident
moments, so are the bits.

    GPU   pinned host memory. Pieces are copied in, updated and copied out, with two buffers on the device: while one is
          updated, the next piece arrives in the other. Not CUDA's unified memory, which bitsandbytes pages with:
          nothing is evicted when memory is short, because nothing is ever there to evict. Each step moves all states
          over the bus and back, 16 bytes per element (8bit: 4).
    CPU   a file that is mapped into memory. There is nothing to copy: the kernel writes pages back and takes them away
          when memory is short, and reads them again when they are touched, as it does without swap space only for
          memory that a file stands behind. It also writes them back when memory is not short, within half a minute of
          every step. The file has no name and is gone with the process; it lies in the folder for temporary files,
          which has to be on a disk (if it is in memory, a tmpfs, pages can only go to swap space).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minift.pinned import pinned_zeros

_PIECE_ELEMENTS = 1 << 22  # two buffers of 32 MiB with fp32 moments; a multiple of every block

PAGED_BUFFER_BYTES = 2 * 8 * _PIECE_ELEMENTS
"""What paging takes of a GPU's memory."""

Work = Callable[[int, tuple[Tensor, ...]], None]
"""(number of the piece, its tensors where the update is computed) -> None, changing the tensors."""


class Memory(Protocol):
    piece_elements: int
    """Most elements whose states are lent at a time."""

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """1-D."""
        ...

    def lend(self, pieces: Sequence[tuple[Tensor, ...]], work: Work) -> None:
        """Call `work` on every piece (views of `zeros` tensors) in turn; what it changes is kept."""
        ...

    def settle(self) -> None:
        """Return when the host may read what the tensors say."""
        ...


def moments_memory(device: torch.device, paged: bool) -> Memory:
    """For moments of masters on `device`."""
    if not paged:
        return Resident(device)
    return PinnedHost(device) if device.type == "cuda" else MappedFile()


class Resident:
    """Device memory that is just there."""

    piece_elements = 1 << 62

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def lend(self, pieces: Sequence[tuple[Tensor, ...]], work: Work) -> None:
        for number, tensors in enumerate(pieces):
            work(number, tensors)

    def settle(self) -> None:
        """Device tensors are read in the order of their stream."""


class MappedFile(Resident):
    """Host memory that a file on the disk stands behind."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Raises OSError if the disk has no room, here and not in the middle of a step."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix="minift-moments-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            except OSError as error:
                raise OSError(
                    f"optim.paged needs {numel * dtype.itemsize >> 20} MiB more in {tempfile.gettempdir()} ({error}); "
                    "valid: a folder for temporary files (TMPDIR) with that much room, or optim.paged false"
                ) from error
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)


class PinnedHost:
    """Host memory that a GPU's copy engines reach, and two buffers on the GPU."""

    piece_elements = _PIECE_ELEMENTS

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)  # the bus goes both ways at once
        self._buffers = torch.empty(2, PAGED_BUFFER_BYTES // 2, dtype=torch.uint8, device=device)
        self._loaded, self._stored = ([torch.cuda.Event(), torch.cuda.Event()] for _ in range(2))
        self._in.wait_stream(torch.cuda.current_stream(device))  # whose the buffers' memory was before

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return pinned_zeros(numel, dtype)

    def lend(self, pieces: Sequence[tuple[Tensor, ...]], work: Work) -> None:
        compute = torch.cuda.current_stream(self._device)
        self._in.wait_stream(self._out)  # in the step before, these bytes were on their way back
        for ahead in range(len(pieces) + 1):
            if ahead < len(pieces):
                self._load(ahead % 2, pieces[ahead])
            if ahead == 0:
                continue
            number, slot = ahead - 1, (ahead - 1) % 2
            compute.wait_event(self._loaded[slot])
            on_device = self._views(slot, pieces[number])
            work(number, on_device)
            self._out.wait_stream(compute)
            with torch.cuda.stream(self._out):
                for host, device in zip(pieces[number], on_device, strict=True):
                    host.copy_(device, non_blocking=True)
                self._stored[slot].record(self._out)

    def settle(self) -> None:
        self._out.synchronize()

    def _load(self, slot: int, piece: tuple[Tensor, ...]) -> None:
        """Begin to copy `piece` into a buffer, when what was in it has left."""
        self._in.wait_event(self._stored[slot])
        with torch.cuda.stream(self._in):
            for device, host in zip(self._views(slot, piece), piece, strict=True):
                device.copy_(host, non_blocking=True)
            self._loaded[slot].record(self._in)

    def _views(self, slot: int, piece: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Where `piece` lies in a buffer, each tensor aligned like an allocation of its own."""
        views, offset = [], 0
        for tensor in piece:
            views.append(self._buffers[slot, offset : offset + tensor.nbytes].view(tensor.dtype))
            offset += -(-tensor.nbytes // 512) * 512
        return tuple(views)
