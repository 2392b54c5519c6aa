"""What the engine may choose: a frozen policy, no behaviour.

| strategy | a rank stores between steps, of N          | gathered weights live until     | gradients are reduced    |
|----------|--------------------------------------------|---------------------------------|--------------------------|
| ddp      | everything                                 | the next update                 | once a step, all-reduce  |
| zero1    | 1/N of masters and optimizer state         | the next update                 | once a step              |
| zero2    | 1/N of masters, optimizer state, gradients | the next update                 | after every microbatch   |
| zero3    | 1/N of everything                          | a unit's forward, its backward | after every microbatch   |

Where gathering would copy what all ranks can see already, nothing is gathered under any of them: see `bucket`.

With `replicas` = R, N is the size of one of R groups: each group shards as above, and gradients are added up over the
groups once a step (HSDP; ddp is R = all ranks, each a group of one).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ShardPolicy:
    """How weights, gradients and optimizer state are spread over the processes, and for how long gathered copies
    live.
    """

    strategy: Literal["zero3", "zero2", "zero1", "ddp"] = "zero3"
    """What is sharded: zero1 the optimizer state, zero2 gradients too, zero3 weights too (FSDP); ddp: nothing."""

    replicas: int = 1
    """Number of groups of processes that each hold the whole model (HSDP); gradients are all-reduced between them."""

    reshard_after_forward: bool = True
    """zero3: free a block's gathered weights after its forward and gather them again for its backward. `true`: two
    all-gathers per block and step, few blocks alive at a time. `false`: one, and all blocks stay until their
    backward."""

    keep_gathered: tuple[str, ...] = ()
    """zero3: blocks (regular expressions searched in their names) that stay from forward to backward nevertheless."""

    prefetch_units: int = 1
    """How many blocks ahead weights are gathered, forward and backward; each costs one block of memory. 0: none."""

    step_in_backward: bool = False
    """Update a block's weights as soon as its gradients are reduced, so that no more than two blocks' gradients exist.
    Needs optim.max_grad_norm null (the global norm is known too late) and one microbatch per step."""

    offload: bool = False
    """Keep master weights, gradients and optimizer state in host memory, and update them there (ZeRO-Offload)."""

    offload_frozen: tuple[str, ...] = ()
    """zero3: blocks (regular expressions searched in their names) whose frozen weights wait in host memory for their
    forward and backward; what is trained stays on the device. ["layers"]: all of them. Useless on CPUs."""

    def __post_init__(self) -> None:
        if self.strategy not in ("zero3", "zero2", "zero1", "ddp"):
            raise ValueError(f"fsdp.strategy is {self.strategy!r}; valid: zero3, zero2, zero1, ddp")
        if self.replicas < 1:
            raise ValueError(f"fsdp.replicas is {self.replicas}; valid: 1 or more")
        if self.prefetch_units < 0:
            raise ValueError(f"fsdp.prefetch_units is {self.prefetch_units}; valid: 0 or more")
        if self.strategy == "ddp" and self.replicas != 1:
            raise ValueError(
                f"fsdp.replicas is {self.replicas} with strategy ddp, which replicates everything; valid: 1"
            )
        if self.strategy in ("ddp", "zero1") and self.step_in_backward:
            raise ValueError(
                f"fsdp.step_in_backward saves the memory of gradients, which strategy {self.strategy} keeps whole; "
                "valid with zero2 and zero3"
            )
        if self.offload and (self.strategy in ("ddp", "zero1") or self.replicas > 1):
            raise ValueError(
                f"fsdp.offload is true with strategy {self.strategy} and {self.replicas} replica(s), where gradients "
                "are summed up in device memory once a step; valid with zero2 and zero3 without replicas"
            )
        if self.offload_frozen and (self.strategy != "zero3" or not self.reshard_after_forward or self.offload):
            raise ValueError(
                f"fsdp.offload_frozen is {list(self.offload_frozen)} with strategy {self.strategy}, "
                f"reshard_after_forward {str(self.reshard_after_forward).lower()} and offload "
                f"{str(self.offload).lower()}; valid with zero3 and resharding, where blocks are gathered in turns, "
                "and without offload, which is for everything"
            )
        for option, pattern in self.patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{option} has {pattern!r}, no regular expression ({error})") from None

    def patterns(self) -> list[tuple[str, str]]:
        """(option, regular expression) of all that choose blocks."""
        kept = [("fsdp.keep_gathered", pattern) for pattern in self.keep_gathered]
        return kept + [("fsdp.offload_frozen", pattern) for pattern in self.offload_frozen]

    def shard_size(self, world_size: int) -> int:
        """Ranks among which one copy of the model is cut up. ValueError if the ranks cannot form equal groups."""
        if self.strategy == "ddp":
            return 1
        if world_size % self.replicas:
            raise ValueError(
                f"fsdp.replicas is {self.replicas} on {world_size} processes; valid: a divisor of {world_size}"
            )
        return world_size // self.replicas

    def keeps_until_update(self) -> bool:
        """Whether every rank holds all weights all the time."""
        return self.strategy != "zero3"

    def keeps_until_backward(self, unit_name: str) -> bool:
        """Whether zero3 leaves this block gathered between its forward and its backward."""
        return not self.reshard_after_forward or any(re.search(p, unit_name) for p in self.keep_gathered)

    def is_offloaded(self, unit_name: str, trainable: bool) -> bool:
        """Whether such weights of this block (the root: "") are stored in host memory."""
        chosen = unit_name != "" and any(re.search(pattern, unit_name) for pattern in self.offload_frozen)
        return self.offload or (chosen and not trainable)

    def keeps_full_gradients(self, shard_size: int) -> bool:
        """Whether gradients of several microbatches are added up before they are reduced: in buffers of the whole size,
        which a group of one has anyway (unless it updates in backward, or keeps gradients in host memory)."""
        return self.strategy in ("ddp", "zero1") or (shard_size == 1 and not (self.step_in_backward or self.offload))
