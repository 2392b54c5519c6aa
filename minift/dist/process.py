"""Start and stop the process group, and describe this process's place in it.

`init_world()` reads what `torchrun` puts in the environment; without it the world is a group of one over an in-memory
store, so nothing above this file ever asks whether it is distributed. The result is a `World`, passed down explicitly:
there is no global state beside torch's own.

Backends: NCCL on GPUs, of which every rank needs one of its own (several processes cannot share one); gloo on CPUs.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minift.dist.rendezvous import fresh_store


@dataclass(frozen=True)
class World:
    """This process among `size` processes.

    `group` is what `torch.distributed` calls take; ranks in it are 0 … size - 1 in `torch.distributed`'s numbering of
    the group; None in a world on paper, which never communicates. `device` is where tensors live; `backend` is "gloo"
    or "nccl".
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """True on the one process that talks to the user and writes shared files."""
        return self.rank == 0


def launched_rank() -> int:
    """What the launcher says, before there is a group."""
    return int(os.environ.get("RANK", "0"))


def init_world(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Initialise `torch.distributed` and return this process's `World`.

    `device`: "cpu", "cuda", or "auto" (CUDA when present). Raises `ValueError` when more local processes were launched
    than there are GPUs, and says what to do, before any group is started.
    """
    rank = launched_rank()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; valid: auto, cpu, cuda")
    num_gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    if device == "cuda" and num_gpus == 0:
        raise ValueError("device is 'cuda' but torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device == "cuda" and local_size > num_gpus:
        raise ValueError(
            f"{local_size} processes were launched on this machine but it has {num_gpus} GPU(s); launch "
            f"torchrun --nproc-per-node {num_gpus}, or use --device cpu"
        )
    torch_device = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(torch_device)
    backend = "nccl" if device == "cuda" else "gloo"

    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        try:
            store = fresh_store(rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except dist.DistNetworkError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"the processes cannot meet at {address} ({str(error).splitlines()[0]}); is the port in use? On one "
                "machine launch with torchrun --standalone, which picks a free one"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    assert dist.group.WORLD is not None
    return World(rank, size, local_rank, torch_device, backend, dist.group.WORLD)


def shutdown() -> None:
    """Leave the process group; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
