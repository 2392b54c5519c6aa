"""Plans of one model on one kind of machine: what a candidate takes, whether it fits, what would.

    planner = Planner(model, machine)
    plan = planner.plan(Candidate(setup, workload, step_tokens))
    plan.memory.peak_bytes, plan.fits
    planner.smallest_change(candidate)

The model is put together once for each way of storing and cutting it; what else a candidate may change (tokens,
recomputation, moments) is changed on paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from minift.model.config import ModelConfig
from minift.planner.calibration import find_calibration
from minift.planner.catalog import (
    CONTEXT_BYTES,
    HOST_USABLE,
    RANKS_PER_NODE,
    USABLE,
    gpu,
    network,
    this_gpu,
    this_machine_bytes,
)
from minift.planner.choices import Candidate, alternatives, smallest_changes
from minift.planner.describe import describe
from minift.planner.device import Device
from minift.planner.memory import MemoryPlan, plan_memory
from minift.planner.network import Network
from minift.planner.shapes import Link, RunShape, Workload
from minift.planner.timing import Timed, time_step
from minift.quant.weights import QuantWeights


class Loop(Protocol):
    """What is read of `train.TrainConfig`."""

    examples_per_step: int
    microbatch_tokens: int


@dataclass(frozen=True)
class Machine:
    """world_size ranks, each with a device of so much memory. link: how they exchange tensors.

    device, network: figures for times; None: there are none. host_bytes: of the memory of a node, with at most so many
    ranks, which what GPUs keep there must fit into; infinite: nobody said.
    """

    name: str
    memory_bytes: int
    world_size: int
    link: Link
    device: Device | None = None
    network: Network | None = None
    host_bytes: float = math.inf
    ranks_per_node: int = RANKS_PER_NODE

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"--world-size is {self.world_size}; valid: 1 or more")

    @classmethod
    def named(cls, name: str | None, world_size: int, network_name: str, host_gib: float | None) -> Machine:
        """cpu: this machine. None: the GPU that it has, or else an H100. host_gib: None: what this machine has, if that
        is its GPU. ValueError for names that `catalog` does not have."""
        if host_gib is not None and not host_gib > 0:
            raise ValueError(f"--host-memory is {host_gib:g}; valid: GiB of a node, more than 0")
        if name is not None and name.lower() == "cpu":
            if host_gib is not None:
                raise ValueError("--host-memory is of what has GPUs; valid with --device cpu: without it")
            return cls.here(world_size)
        found = this_gpu()
        machine = cls.of_gpus(name or found or "h100", world_size, network_name)
        if host_gib is not None:
            return replace(machine, host_bytes=host_gib * 2**30)
        if machine.name != found:
            return machine
        return replace(machine, host_bytes=this_machine_bytes(), ranks_per_node=torch.cuda.device_count())

    @classmethod
    def of_gpus(cls, name: str, world_size: int, network_name: str) -> Machine:
        """With any amount of host memory. ValueError for names that `catalog` does not have."""
        device = gpu(name)
        return cls(device.name, int(device.memory_bytes), world_size, "nccl", device, network(network_name))

    @classmethod
    def here(cls, world_size: int) -> Machine:
        """CPU processes on this machine, which share its memory; with times if it was calibrated."""
        calibration = find_calibration("cpu")
        memory_bytes = this_machine_bytes() // max(1, world_size)
        if calibration is None or world_size < 1:
            return cls("cpu", memory_bytes, world_size, "shared memory")
        figures = calibration.device(world_size), calibration.network(world_size)
        return cls("cpu", memory_bytes, world_size, "shared memory", *figures)

    @property
    def is_gpu(self) -> bool:
        return self.link == "nccl"

    @property
    def usable_bytes(self) -> int:
        """What tensors can have of it."""
        return int(USABLE * (self.memory_bytes - (CONTEXT_BYTES if self.is_gpu else 0)))

    @property
    def ranks_of_a_node(self) -> int:
        return min(self.world_size, self.ranks_per_node)

    @property
    def usable_host_bytes(self) -> float:
        """What ranks can have of their node's memory, all of them."""
        return HOST_USABLE * self.host_bytes

    def has_room(self, memory: MemoryPlan) -> bool:
        """On a rank's device, and for all ranks of a node on its host."""
        return memory.peak_bytes <= self.usable_bytes and self.host_has_room(memory)

    def host_has_room(self, memory: MemoryPlan) -> bool:
        return self.ranks_of_a_node * memory.host_bytes <= self.usable_host_bytes


@dataclass(frozen=True)
class Plan:
    """One candidate on paper. timed: None without figures of the device."""

    candidate: Candidate
    machine: Machine
    run: RunShape
    memory: MemoryPlan
    timed: Timed | None = None

    @property
    def no_time(self) -> str:
        """Why it has none."""
        if self.machine.device is None:
            return f"there are no figures of {self.machine.name}; minift plan --calibrate measures this machine"
        return "fsdp.offload updates weights on the GPU's host, of which there are no figures"

    @property
    def fits(self) -> bool:
        return self.machine.has_room(self.memory)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks."""
        return None if self.timed is None else self.candidate.step_tokens / self.timed.seconds

    @cached_property
    def seconds_without_host(self) -> float | None:
        """Of a step, if it took no time to start operations."""
        if self.timed is None:
            return None
        device = replace(self.machine.device, call_s=0.0, pass_s=0.0, step_s=0.0)
        return time_step(self.run, device, self.machine.network).seconds

    @property
    def is_launch_bound(self) -> bool:
        """Whether a GPU waits for its host in more than a tenth of a step."""
        return self.machine.is_gpu and self.timed is not None and 0.9 * self.timed.seconds > self.seconds_without_host


def workload_of(
    loop: Loop, longest_tokens: int, world_size: int, document_tokens: int | None = None, supervised: float = 1.0
) -> Workload:
    """What a rank computes in a step: its part of the documents, as many in a microbatch as there is room for.

    longest_tokens: of a document. document_tokens: of all of them; None: the longest, which takes most memory.
    supervised: the part of the tokens that the loss counts. ValueError if it is none, or more than all.
    """
    if not 0 < supervised <= 1:
        raise ValueError(f"the supervised part of the tokens is {supervised}; valid: above 0, at most 1")
    length = min(document_tokens or longest_tokens, loop.microbatch_tokens)
    documents = math.ceil(loop.examples_per_step / world_size)
    at_once = min(documents, loop.microbatch_tokens // length)
    tokens = at_once * length
    return Workload(
        tokens=tokens,
        document_tokens=length,
        microbatches=math.ceil(documents / at_once),
        targets=None if supervised == 1 else math.ceil(supervised * tokens),
    )


@dataclass
class Planner:
    """weights: of the model's folder, if there is one."""

    model: ModelConfig
    machine: Machine
    weights: QuantWeights | None = None
    _described: dict[tuple[Any, ...], RunShape] = field(default_factory=dict)

    def plan(self, candidate: Candidate) -> Plan:
        """ValueError for what building or training would refuse."""
        run = self._describe(candidate)
        timed = None
        machine = self.machine
        if machine.device is not None and machine.network is not None and not run.host_updates:
            timed = time_step(run, machine.device, machine.network)
        return Plan(candidate, machine, run, plan_memory(run), timed)

    def smallest_change(self, asked: Candidate) -> Plan | None:
        """Of the plans with the fewest changes that fit the fastest, or, without figures of the device, the largest;
        None if `choices` knows no change that helps."""
        plans = [self.plan(candidate) for candidate in smallest_changes(asked, self._fits)]
        return min(plans, key=_cost, default=None)

    def search(self, asked: Candidate) -> list[Plan]:
        """Ways to compute the same step that fit, as it is one of them; the fastest first, or, without figures of the
        device, the largest: memory is what time is bought with."""
        others = alternatives(asked, self.machine.world_size)
        plans = [self.plan(candidate) for candidate in others if self._fits(candidate)]
        return sorted(plans, key=_cost)

    def fewest_ranks(self, asked: Candidate, most: int = 1024) -> Plan | None:
        """Of 1, 2, 4, ... ranks with this device, the fewest on which the candidate fits."""
        for doublings in range(most.bit_length()):
            machine = replace(self.machine, world_size=1 << doublings)
            plan = Planner(self.model, machine, self.weights).plan(asked)
            if plan.fits:
                return plan
        return None

    def _fits(self, candidate: Candidate) -> bool:
        try:
            run = self._describe(candidate)
        except ValueError:  # what the model, or the number of ranks, refuses
            return False
        return self.machine.has_room(plan_memory(run))

    def _describe(self, candidate: Candidate) -> RunShape:
        setup = candidate.setup
        key = (repr(setup.adapter), setup.quant, setup.train, setup.freeze, setup.precision, setup.fsdp)
        if key not in self._described:
            self._described[key] = describe(
                self.model,
                setup,
                world_size=self.machine.world_size,
                link=self.machine.link,
                workload=candidate.workload,
                weights=self.weights,
            )
        run = self._described[key]
        recompute = setup.recompute
        blocks = [
            replace(unit, recompute=recompute.policy if number % recompute.every == 0 else "none")
            for number, unit in enumerate(run.blocks)
        ]
        return replace(
            run, units=(run.root, *blocks), workload=candidate.workload, optim=setup.optim, recompute=recompute
        )


def _cost(plan: Plan) -> tuple[bool, float]:
    """What has no time comes last."""
    return plan.timed is None, -plan.memory.peak_bytes if plan.timed is None else plan.timed.seconds
