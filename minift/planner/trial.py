"""A run with random weights and random tokens, to be timed, counted or recorded: the same engine, step and kernels as
in training, without files. What a plan says of a `RunShape`, a `Trial` of the same setup does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minift.build import construct
from minift.data.batch import IGNORE, Batch
from minift.dist.collectives import barrier
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.fsdp.transport import Transport
from minift.model.config import ModelConfig
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.peft.adapter import AdapterConfig
from minift.planner.shapes import Setup, Workload
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig, apply_recompute
from minift.step import StepResult, train_step
from minift.trace import Recorder, Trace

_SCALE = 0.02  # of weights


@dataclass(frozen=True)
class TrialSetup:
    """What decides how a trial runs: the parts of `config.RunConfig` that `shapes.Setup` names, with their defaults."""

    adapter: AdapterConfig | None = None
    quant: QuantConfig | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    optim: OptimConfig = OptimConfig()
    precision: Precision = Precision()
    fsdp: ShardPolicy = ShardPolicy()
    recompute: RecomputeConfig = RecomputeConfig()


class Trial:
    """One rank's part. Collective: all ranks of `world` make one alike, and step it equally often."""

    def __init__(
        self,
        config: ModelConfig,
        setup: Setup,
        workload: Workload,
        world: World,
        connect: Callable[[World], Transport] = connect,
    ) -> None:
        self.setup, self.world = setup, world
        self.recorder = Recorder(world.rank, world.device)
        self.module = construct(
            config, None, setup.adapter, quant=setup.quant, train=setup.train, freeze=setup.freeze
        ).module
        units = self.module.shard_units()
        apply_recompute(self.module, units, setup.recompute, self.recorder)
        self.engine = shard(self.module, units, world, setup.fsdp, setup.precision, self.recorder, connect)
        self.engine.load(partial(random_weights, device=world.device))
        self.optimizer = AdamW(self.engine.trainable_shards(), setup.optim)
        self.microbatches = [
            random_batch(config.vocab_size, workload, seed=number).to(world.device)
            for number in range(workload.microbatches)
        ]

    def step(self) -> StepResult:
        """One optimizer step, always of the same tokens."""
        return train_step(
            self.module,
            self.engine,
            self.optimizer,
            SupervisedTokens(),
            self.microbatches,
            lr_scale=1.0,
            max_grad_norm=self.setup.optim.max_grad_norm,
            scaler=None,
            recorder=self.recorder,
        )

    def timed_step(self) -> float:
        """Seconds from when all ranks begin until all have ended."""
        barrier(self.world)
        started = time.perf_counter()
        self.step()
        barrier(self.world)
        return time.perf_counter() - started

    def recorded_step(self) -> Trace:
        """What happened when in one step."""
        barrier(self.world)
        self.recorder.start()
        self.step()
        return self.recorder.stop()


def random_weights(name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """Elements [start, stop) of a parameter, flattened, on `device`: matrices small and normal, norms 1. Of packed
    weights: random codes, and scales that make the weights about as large."""
    generator = torch.Generator(device).manual_seed(start)
    part = name.rpartition(".")[2]
    if part == "codes":
        return torch.randint(256, (stop - start,), generator=generator, dtype=torch.uint8, device=device)
    if part == "shifts":
        return torch.zeros(stop - start, dtype=torch.uint8, device=device)
    if part in ("scales", "nested"):  # in 8 bits any bytes; not all alike, for a GPU multiplies few values faster
        scales = torch.rand(stop // 4 + 1, generator=generator, device=device).add_(0.5).mul_(_SCALE)
        return scales.view(torch.uint8)[start:stop]
    if "norm" in name:
        return torch.ones(stop - start, device=device)
    return torch.randn(stop - start, generator=generator, device=device) * _SCALE


def random_batch(vocab_size: int, workload: Workload, seed: int) -> Batch:
    """A microbatch of `workload`; its first tokens are those that are predicted."""
    generator = torch.Generator().manual_seed(seed)
    lengths = workload.lengths
    tokens_T, targets_T = torch.randint(vocab_size, (2, workload.tokens), generator=generator)
    targets_T[workload.num_targets :] = IGNORE
    return Batch(
        tokens_T=tokens_T,
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        targets_T=targets_T,
    )
