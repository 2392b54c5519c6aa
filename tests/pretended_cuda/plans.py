"""Measures what one training step of large models takes on a device that is not there, and prints it beside the plan:
JSON, {case: [planned bytes, measured bytes]}. Of Llama-3.2-1B these are six blocks: more are more of the same."""

from __future__ import annotations

import torch

from minift.fsdp import ShardPolicy
from minift.model.config import ModelConfig
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner.catalog import MODELS
from minift.planner.check import held_bytes
from minift.planner.describe import describe
from minift.planner.memory import plan_memory
from minift.planner.meter import TensorMeter
from minift.planner.shapes import Workload
from minift.planner.trial import TrialSetup
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from tests.pretended_cuda.device import print_found
from tests.pretended_cuda.training import training

LORA = LoraConfig(r=16, alpha=32.0)
NF4 = QuantConfig()
CASES = {
    "llama-3.2-1b, lora": TrialSetup(adapter=LORA),
    "llama-3.2-1b, lora, offloaded activations": TrialSetup(adapter=LORA, recompute=RecomputeConfig("offload")),
    "llama-3.1-8b, qlora, selective recompute": TrialSetup(
        adapter=LORA, quant=NF4, recompute=RecomputeConfig("selective")
    ),
    "llama-3.1-8b, qlora, full recompute": TrialSetup(adapter=LORA, quant=NF4, recompute=RecomputeConfig("full")),
    "llama-3.2-1b, lora, full recompute, half of the blocks in host memory": TrialSetup(
        adapter=LORA,
        recompute=RecomputeConfig("full"),
        fsdp=ShardPolicy(offload_frozen=("[13579]$",), prefetch_units=2),
    ),
    "llama-3.2-1b, lora with dropout": TrialSetup(adapter=LoraConfig(r=16, dropout=0.05)),
    "llama-3.2-1b, qlora": TrialSetup(adapter=LORA, quant=NF4),
    "llama-3.2-1b, full": TrialSetup(),
    "llama-3.2-1b, full, selective recompute": TrialSetup(recompute=RecomputeConfig("selective")),
    "llama-3.2-1b, full, offloaded": TrialSetup(fsdp=ShardPolicy(offload=True)),
    "llama-3.2-1b, full, updates in backward": TrialSetup(fsdp=ShardPolicy(step_in_backward=True)),
    "llama-3.2-1b, full, 8-bit moments": TrialSetup(optim=OptimConfig(state="8bit")),
    "llama-3.2-1b, full, fp32": TrialSetup(precision=Precision(wire="float32")),
}


def planned_and_measured(model: str, setup: TrialSetup, workload: Workload) -> tuple[int, int]:
    """Peak bytes of the second step, on the device, and on the host between steps, which is not told apart."""
    fewer = {"num_hidden_layers": 6} if model == "llama-3.2-1b" else {}
    config = ModelConfig.from_hf(MODELS[model] | fewer)
    plan = plan_memory(describe(config, setup, world_size=1, link="nccl", workload=workload))
    with training(config, setup, workload) as run:
        for _ in range(2):
            with TensorMeter(torch.device("cuda", 0)) as meter:
                run.step()
        held = sum(held_bytes(run.engine, run.optimizer).values())
    host_bytes = sum(num_bytes for what, num_bytes in plan.host.items() if what != "activations")  # nothing holds these
    return plan.peak_bytes + host_bytes, held + meter.peak_bytes


def main() -> None:
    workload = Workload(tokens=8192, document_tokens=4096)
    print_found(CASES, lambda name: planned_and_measured(name.partition(",")[0], CASES[name], workload))


if __name__ == "__main__":
    main()
