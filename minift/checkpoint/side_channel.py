"""A second connection between the ranks of a world, for one thread beside the one that trains.

Collectives of one process group must come in the same order on every rank. Two threads cannot promise that, so the
thread that saves has a group of its own. It is made without `dist.new_group`, which all processes of the job would have
to call, and which names a group after its ranks: the second one with the same name finds the addresses of the first.
"""

from __future__ import annotations

import datetime
import pickle
import uuid
from typing import Any

import torch
import torch.distributed as dist

from minift.dist.collectives import gather_objects
from minift.dist.process import World

_SLOWEST_RANK = datetime.timedelta(hours=1)


class SideChannel:
    """Gathers small objects. Collective to make; a rank may wait up to an hour for the others in `gather`."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._group: dist.ProcessGroupGloo | None = None
        if world.size > 1:
            name = gather_objects(f"side-channel-{uuid.uuid4()}", world)[0]
            store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            self._group = dist.ProcessGroupGloo(store, world.rank, world.size, _SLOWEST_RANK)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. RuntimeError if the connection to one of them is lost."""
        if self._group is None:
            return [value]
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._all_gather(torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        padded = torch.cat((mine, torch.zeros(longest - len(mine), dtype=torch.uint8)))
        everybody = self._all_gather(padded)
        return [pickle.loads(bytes(other[: int(n)].numpy())) for other, n in zip(everybody, sizes, strict=True)]

    def _all_gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        assert self._group is not None
        received = [torch.empty_like(value) for _ in range(self.size)]
        self._group.allgather([received], [value]).wait()
        return received
