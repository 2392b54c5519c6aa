"""Device memory on its way to a file: copies to pinned host memory, on a stream of their own.

Nothing here waits. A copy gives an event: the writer waits for it before it touches the host bytes, and the compute
stream is told to wait for it before the device bytes are overwritten, which costs the host nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceReader:
    """A ring of LOOKAHEAD + 1 pinned buffers, reused in turn, so that copies run ahead of the disk."""

    LOOKAHEAD = 2

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._ring = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self.LOOKAHEAD + 1)]
        self._num_copies = 0

    def follow_compute(self) -> None:
        """Copies from now on see everything that the current stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def to_ring(self, live: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy `live` (1-D uint8, at most a piece) into the oldest buffer; at most LOOKAHEAD others may be in use."""
        host = self._ring[self._num_copies % len(self._ring)][: live.numel()]
        self._num_copies += 1
        return host, self._copy(live, host)

    def to_new(self, live: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy `live` into pinned memory of its own (which torch keeps for the next such copy when it is let go)."""
        host = torch.empty(live.numel(), dtype=torch.uint8, pin_memory=True)
        return host, self._copy(live, host)

    def hold_compute(self, copied: torch.cuda.Event) -> None:
        """What the current stream is given from now on happens after the copy."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def _copy(self, live: Tensor, host: Tensor) -> torch.cuda.Event:
        copied = torch.cuda.Event()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            host.copy_(live, non_blocking=True)
            copied.record(self._stream)
        return copied
