"""Takes training steps on a device that is not there, and prints as JSON where each of them made the host wait, how
many updates it was ahead of the device by then, and what nothing put in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from minift.build import construct
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import LossScaler
from minift.optim.memory import PinnedHost
from minift.peft.adapter import AdapterConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.lora import LoraConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig, apply_recompute
from minift.step import train_step
from minift.trace import Recorder
from tests.pretended_cuda.device import pretended_cuda, print_found
from tests.test_step import CONFIG, batch


@dataclass(frozen=True)
class Case:
    adapter: AdapterConfig | None = None
    quant: QuantConfig | None = None
    recompute: RecomputeConfig = RecomputeConfig()
    policy: ShardPolicy = ShardPolicy()
    precision: Precision = Precision()
    optim: OptimConfig = OptimConfig()


LORA = LoraConfig(r=4)
CASES = {
    "full": Case(),
    "full, fp32": Case(precision=Precision(wire="float32")),
    "full, fp16": Case(precision=Precision(wire="float16")),
    "full, bf16 masters, 8-bit moments": Case(
        precision=Precision(master="bfloat16", stochastic_rounding=True), optim=OptimConfig(state="8bit")
    ),
    "full, paged moments": Case(optim=OptimConfig(paged=True)),
    "full, selective recompute": Case(recompute=RecomputeConfig("selective")),
    "full, updates in backward": Case(policy=ShardPolicy(step_in_backward=True)),
    "full, shards in host memory": Case(policy=ShardPolicy(offload=True)),
    "full, both of these": Case(policy=ShardPolicy(offload=True, step_in_backward=True)),
    "lora": Case(LORA),
    "lora, dropout": Case(LoraConfig(r=4, dropout=0.1)),
    "lora, full recompute": Case(LORA, recompute=RecomputeConfig("full")),
    "lora, offloaded activations": Case(LORA, recompute=RecomputeConfig("offload")),
    "lora, frozen weights in host memory": Case(LORA, policy=ShardPolicy(offload_frozen=("1$",), prefetch_units=2)),
    "qlora": Case(LORA, QuantConfig()),
    "qlora, full recompute": Case(LORA, QuantConfig(), RecomputeConfig("full")),
    "dora": Case(DoraConfig(r=4)),
    "bottleneck": Case(BottleneckConfig()),
    "ia3": Case(IA3Config()),
    "prefix": Case(PrefixConfig(num_virtual_tokens=3)),
    "prompt": Case(PromptConfig(num_virtual_tokens=3)),
}


def run(case: Case) -> dict[str, Any]:
    """Where the second of two steps, of two microbatches where that may be, waits; mistakes of both."""
    world = World(0, 1, 0, torch.device("cuda", 0), "nccl", None)
    recorder = Recorder(0, world.device)
    microbatches = [batch([0, 1, 2], 0)] if case.policy.step_in_backward else [batch([0, 1, 2], 0), batch([3, 4], 0)]
    assert all(microbatch.num_targets for microbatch in microbatches)  # counted by the host before
    model = construct(ModelConfig.from_hf(CONFIG), None, case.adapter, quant=case.quant).module
    with pretended_cuda() as waits, mock.patch.object(PinnedHost, "piece_elements", 64):  # many pieces
        apply_recompute(model, model.shard_units(), case.recompute, recorder)
        engine = shard(model, model.shard_units(), world, case.policy, case.precision, recorder)
        optimizer = AdamW(engine.trainable_shards(), case.optim)
        scaler = LossScaler() if case.precision.needs_loss_scaling else None
        for _ in range(2):
            waits.places.clear()
            waits.updates.clear()
            train_step(
                model, engine, optimizer, SupervisedTokens(), microbatches,
                lr_scale=1.0, max_grad_norm=None if case.policy.step_in_backward else 1.0, scaler=scaler,
                recorder=recorder,
            )  # fmt: skip
        found = {"waits": list(waits.places), "updates": len(waits.updates), "updates_ahead": waits.updates_ahead}
        optimizer.state_dict()  # nothing is on its way any more when the optimizer goes
    return found | {"mistakes": waits.order.mistakes}


def main() -> None:
    print_found(CASES, lambda name: run(CASES[name]))


if __name__ == "__main__":
    main()
