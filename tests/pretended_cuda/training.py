"""Training steps on a device that is not there, of models of which not a byte is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minift.build import construct
from minift.data.batch import Batch
from minift.dist.process import World
from minift.fsdp import ShardedModel, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.planner.shapes import Workload
from minift.planner.trial import TrialSetup, random_batch
from minift.recompute import apply_recompute
from minift.step import train_step
from minift.trace import Recorder
from tests.pretended_cuda.device import Waits, pretended_cuda


@dataclass(frozen=True)
class Training:
    """device: what is known of the device."""

    device: Waits
    module: CausalLM
    engine: ShardedModel
    optimizer: AdamW
    batches: list[Batch]
    recorder: Recorder

    def step(self) -> None:
        """Without clipping."""
        train_step(
            self.module, self.engine, self.optimizer, SupervisedTokens(), self.batches,
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=self.recorder,
        )  # fmt: skip


@contextmanager
def training(config: ModelConfig, setup: TrialSetup, workload: Workload) -> Iterator[Training]:
    """One rank's."""
    world = World(0, 1, 0, torch.device("cuda", 0), "nccl", None)
    recorder = Recorder(0, world.device)
    batches = [random_batch(config.vocab_size, workload, seed) for seed in range(workload.microbatches)]
    assert all(batch.num_targets for batch in batches)  # counted by the host before
    module = construct(config, None, setup.adapter, quant=setup.quant).module
    with pretended_cuda() as device:
        apply_recompute(module, module.shard_units(), setup.recompute, recorder)
        engine = shard(module, module.shard_units(), world, setup.fsdp, setup.precision, recorder)
        optimizer = AdamW(engine.trainable_shards(), setup.optim)
        yield Training(device, module, engine, optimizer, batches, recorder)
