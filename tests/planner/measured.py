"""What a step really takes: a model put together as `minift.build` does it, with random weights, and every byte that
PyTorch's CPU allocator hands out during one optimizer step, temporaries inside of operations included."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minift.build import construct
from minift.data.batch import IGNORE, Batch
from minift.dist.process import World
from minift.fsdp import shard
from minift.fsdp.sharded import connect
from minift.fsdp.shared_memory import _SharedBuffer
from minift.fsdp.transport import Buffer, PairedSends, Transport, _StagedBuffer
from minift.model.config import ModelConfig
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.planner.describe import describe
from minift.planner.shapes import RunShape, Workload
from minift.planner.trial import TrialSetup as Setup
from minift.recompute import apply_recompute
from minift.step import train_step
from minift.trace import Recorder


@dataclass(frozen=True)
class Case:
    hf: dict
    setup: Setup
    work: Workload
    world_size: int = 1
    link: str = "shared memory"

    def on_paper(self) -> RunShape:
        return describe(
            ModelConfig.from_hf(self.hf),
            self.setup,
            world_size=self.world_size,
            link=self.link,
            workload=self.work,
        )


@dataclass(frozen=True)
class Measured:
    """Of one rank, in bytes. held: between steps, its share of what is shared. peak: beside that, in a step."""

    held: int
    peak: int
    sent: int


def measure(world: World, case: Case) -> Measured:
    """Of the second step: the first learns the order of the blocks."""
    setup = case.setup
    recorder = Recorder(world.rank, world.device)
    model = construct(
        ModelConfig.from_hf(case.hf), None, setup.adapter, quant=setup.quant, train=setup.train, freeze=setup.freeze
    ).module
    apply_recompute(model, model.shard_units(), setup.recompute, recorder)
    buffers: WeakSet[Buffer] = WeakSet()  # not those that were there for a moment
    engine = shard(
        model, model.shard_units(), world, setup.fsdp, setup.precision, recorder,
        lambda members: _watched(connect if case.link == "shared memory" else _sends, members, buffers),
    )  # fmt: skip
    engine.load(lambda name, start, stop: _values(model.get_parameter(name).dtype, stop - start))
    optimizer = AdamW(engine.trainable_shards(), setup.optim)
    batches = [make_batch(case.work, case.hf["vocab_size"]) for _ in range(case.work.microbatches)]

    def step() -> None:
        train_step(
            model, engine, optimizer, SupervisedTokens(), batches, lr_scale=1.0,
            max_grad_norm=setup.optim.max_grad_norm, scaler=None, recorder=recorder,
        )  # fmt: skip

    step()
    gc.collect()
    sent = engine.sent_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    shared = _storages(b.memory for b in buffers if isinstance(b, _SharedBuffer))
    tensors = [b.memory for b in buffers] + [b.staging for b in buffers if isinstance(b, _StagedBuffer)]
    tensors += [t for bucket in engine.buckets for t in (bucket.shard, bucket.lower, bucket.grad) if t is not None]
    tensors += [t for moments in optimizer._moments.values() for t in moments.tensors.values()]
    tensors += [t for b in batches for t in (b.tokens_T, b.positions_T, b.targets_T)]
    held = sum(size for at, size in _storages(tensors).items() if at not in shared)
    held += sum(shared.values()) // engine.shard_world.size
    return Measured(held, allocated_peak(profiler), engine.sent_bytes() - sent)


def allocated_peak(profiler: profile) -> int:
    """The most that was allocated at a time, of what the profiler saw being allocated."""
    events = profiler.profiler.kineto_results.events()
    level = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        level += change
        peak = max(peak, level)
    return peak


def make_batch(work: Workload, vocab_size: int) -> Batch:
    tokens_T = torch.randint(vocab_size, (work.tokens,), generator=torch.Generator().manual_seed(0))
    bounds = [*range(0, work.tokens, work.document_tokens), work.tokens]
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    targets_T = tokens_T.roll(-1)
    targets_T[work.num_targets :] = IGNORE
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens_T, positions_T, torch.tensor(bounds, dtype=torch.int32), max(lengths), targets_T)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """{address: bytes} of what is behind these; several may be views of one."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _watched(connect: Callable[[World], Transport], world: World, buffers: WeakSet[Buffer]) -> Transport:
    """A transport that notes in `buffers` which it has made."""
    transport = connect(world)

    def watch(make: Callable[[int, int], list[Buffer]]) -> Callable[[int, int], list[Buffer]]:
        def made(count: int, num_bytes: int) -> list[Buffer]:
            buffers.update(new := make(count, num_bytes))
            return new

        return made

    transport.gather_buffers, transport.reduce_buffers = (
        watch(transport.gather_buffers),
        watch(transport.reduce_buffers),
    )
    return transport


def _values(dtype: torch.dtype, numel: int) -> Tensor:
    return torch.zeros(numel, dtype=dtype) if dtype == torch.uint8 else torch.randn(numel) * 0.02


def _sends(world: World) -> Transport:
    return Transport(world) if world.size == 1 else PairedSends(world)
