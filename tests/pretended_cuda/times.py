"""Times training steps on a device that is not there, whose streams have clocks, and prints beside what was planned as
JSON, {case: [planned seconds, measured seconds]}.

On this device only matrix products with stored weights, updates and what crosses the bus take time, as on the planner's
here. The order of everything is the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from minift.fsdp import ShardPolicy
from minift.model.config import ModelConfig
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner.catalog import MODELS
from minift.planner.describe import describe
from minift.planner.device import Device, Rate
from minift.planner.network import Network
from minift.planner.shapes import Workload
from minift.planner.timing import time_step
from minift.planner.trial import TrialSetup
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from tests.pretended_cuda.device import print_found
from tests.pretended_cuda.order import tensors_in, written_by
from tests.pretended_cuda.training import training

FLOPS_PER_S, BYTES_PER_S = 1e14, 1e12
RATES = {
    "*": Rate(),
    **{kind: Rate(bytes_per_s=BYTES_PER_S) for kind in ("adamw", "adamw 8bit")},
    **{kind: Rate(flops_per_s=FLOPS_PER_S) for kind in ("linear", "input gradient", "weight gradient")},
}
NUMBERS_BYTES = 1 << 13
"""Loss, norm, the tokens of a microbatch."""
NETWORK = Network(1e9, 1e9, 8)  # a rank alone sends nothing


@dataclass(frozen=True)
class Case:
    """bus: GB/s each way."""

    setup: TrialSetup
    bus: float
    microbatches: int = 1

    @property
    def device(self) -> Device:
        return Device("made up", 1e12, FLOPS_PER_S, BYTES_PER_S, RATES, runs_ahead=True, bus_bytes_per_s=1e9 * self.bus)


LORA = LoraConfig(r=16, alpha=32.0)
AWAY = RecomputeConfig("offload")


def offloading(*patterns: str, prefetch: int = 1, recompute: str = "full") -> TrialSetup:
    policy = ShardPolicy(offload_frozen=patterns, prefetch_units=prefetch)
    return TrialSetup(adapter=LORA, recompute=RecomputeConfig(recompute), fsdp=policy)


PAGED = OptimConfig(paged=True)
CASES = {
    "nothing crosses": Case(TrialSetup(adapter=LORA, recompute=RecomputeConfig("full")), 10),
    **{f"inputs, {bus} GB/s": Case(TrialSetup(adapter=LORA, recompute=AWAY), bus, 2) for bus in (0.5, 4)},
    "inputs of every other block": Case(TrialSetup(recompute=RecomputeConfig("offload", 2)), 2),
    **{f"frozen weights, {bus} GB/s": Case(offloading("layers"), bus) for bus in (10, 200)},
    **{f"frozen weights, {ahead} ahead": Case(offloading("layers", prefetch=ahead), 40) for ahead in (0, 2)},
    "frozen weights, nothing recomputed": Case(offloading("layers", recompute="none"), 40),
    "frozen weights of every other block": Case(offloading("[13579]$", prefetch=2), 40, 2),
    **{f"moments, {bus} GB/s": Case(TrialSetup(optim=PAGED), bus) for bus in (4, 20)},
    "moments, in backward": Case(TrialSetup(optim=PAGED, fsdp=ShardPolicy(step_in_backward=True)), 20),
    "moments of adapters": Case(TrialSetup(adapter=LORA, optim=PAGED), 20, 2),
    "moments in 8 bits": Case(TrialSetup(optim=replace(PAGED, state="8bit")), 4),
    "moments of masters in 16 bits": Case(
        TrialSetup(optim=PAGED, precision=Precision(master="bfloat16", stochastic_rounding=True)), 4
    ),
    "inputs, and moments": Case(TrialSetup(optim=PAGED, recompute=AWAY), 4, 2),
    "everything that can": Case(
        replace(offloading("layers"), quant=QuantConfig(), optim=PAGED, recompute=RecomputeConfig("offload", 2)), 4, 2
    ),
}


class Clock:
    """When operations end on this device. What crosses the bus takes turns on it, each way, in the order in which the
    host begins it; but numbers, of which a step sends a few: how long they wait for others is not planned."""

    def __init__(self, bus: float) -> None:
        self._bus_bytes_per_s = 1e9 * bus
        self._free_at = {"cpu": 0.0, "cuda": 0.0}  # the way from there

    def ends(self, begins: float, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            (m, k), (_, n) = (matrix.shape for matrix in tensors_in(args)[-2:])
            return begins + 2 * m * k * n / FLOPS_PER_S
        if name.startswith("adamw"):
            grad = args[1]
            moved = 2 * sum(tensor.nbytes for tensor in written_by(function, args, kwargs)) + grad.nbytes
            return begins + moved / BYTES_PER_S
        if name in ("copy_", "_to_copy"):
            source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
            way = source.device.type
            if target is not None and torch.device(target).type != way and source.nbytes > NUMBERS_BYTES:
                self._free_at[way] = max(begins, self._free_at[way]) + source.nbytes / self._bus_bytes_per_s
                return self._free_at[way]
        return begins


def planned_and_measured(case: Case) -> tuple[float, float]:
    """Seconds of the second step, which the end of the first one meets."""
    config = ModelConfig.from_hf(MODELS["llama-3.2-1b"] | {"num_hidden_layers": 3})
    workload = Workload(tokens=512, document_tokens=512, microbatches=case.microbatches)
    run = describe(config, case.setup, world_size=1, link="nccl", workload=workload)
    ends = []
    with training(config, case.setup, workload) as trained:
        order = trained.device.order
        order.ends = Clock(case.bus).ends
        for _ in range(2):
            trained.step()
            ends.append(order.current.now)
        trained.optimizer.state_dict()
    return time_step(run, case.device, NETWORK).seconds, ends[1] - ends[0]


def main() -> None:
    print_found(CASES, lambda name: planned_and_measured(CASES[name]))


if __name__ == "__main__":
    main()
