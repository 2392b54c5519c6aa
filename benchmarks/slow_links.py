"""A network on one machine: collectives that last as long as their bytes would take over a link of a given speed."""

from __future__ import annotations

import math
import time

from torch import Tensor

from minift.dist.process import World
from minift.fsdp.transport import Buffer, PairedSends, Pending


class SlowLinks(PairedSends):
    """Paired sends over a link that carries `bytes_per_second` each way, for all collectives of the rank in turn. While
    bytes cross, the process computes or, if it needs them, sleeps."""

    def __init__(self, world: World, bytes_per_second: float = math.inf) -> None:
        super().__init__(world)
        self.bytes_per_second = bytes_per_second
        self.arrivals: list[float] = []
        """When each collective's bytes had crossed, in the order of issue; seconds of time.perf_counter()."""

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        return self._delayed(super().all_gather(buffer, fulls), fulls)

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        return self._delayed(super().reduce_scatter(buffer, fulls, outs, accumulate), fulls)

    def _delayed(self, pending: Pending, fulls: list[Tensor]) -> Pending:
        crossing_bytes = sum(full.nbytes for full in fulls) * (self.world.size - 1) / self.world.size
        free_at = max([time.perf_counter(), *self.arrivals[-1:]])
        arrives_at = free_at + crossing_bytes / self.bytes_per_second
        self.arrivals.append(arrives_at)

        def finish() -> None:
            time.sleep(max(0.0, arrives_at - time.perf_counter()))
            pending.wait()

        return Pending(finish=finish)
