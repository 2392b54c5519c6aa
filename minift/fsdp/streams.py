"""A lane: work beside the computation. On CUDA a stream of its own; on a CPU, where lanes are processes' own business,
nothing.

Nothing here makes the host wait that is not asked to. Buffers that lanes touch are allocated once and never freed, so
the caching allocator, which only knows the stream that allocated, has no chance to hand them out too early; what a lane
allocates for itself (pieces of offloaded shards) only that lane touches. Gradients, which come and go, are the
computing stream's, which has waited for the lane when it lets them go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minift.trace import Mark, Recorder


class Lane:
    """Work given to a lane starts after everything that the current stream was given before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Work issued inside of the block goes to the lane."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def clock(self, recorder: Recorder) -> Mark | None:
        """This moment on the lane, inside of `run`; None on a CPU, where nobody knows when what was begun ends."""
        return None if self._stream is None else recorder.mark()

    def mark(self) -> torch.cuda.Event | None:
        """The end of what the lane was given so far."""
        return None if self._stream is None else self._stream.record_event()


def wait_for(mark: torch.cuda.Event | None, *, on_host: bool = False) -> None:
    """The current stream goes on only after `mark`; so does, if `on_host`, the host."""
    if mark is not None:
        mark.synchronize() if on_host else torch.cuda.current_stream().wait_event(mark)
