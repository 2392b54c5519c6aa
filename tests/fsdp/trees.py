"""Random module trees, their data, and the one-process gradients that the engine's tests compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.fsdp.shared_memory import SharedMemory
from minift.fsdp.transport import PairedSends, Transport
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.model.norm import RMSNorm
from minift.precision import Precision
from minift.trace import Recorder

FP32 = Precision(master="float32", wire="float32", reduce="float32")
BF16 = Precision(master="float32", wire="bfloat16", reduce="float32")


@dataclass(frozen=True)
class Case:
    """A random module tree, its data, and how it is sharded."""

    world_size: int
    width: int = 7
    hidden: int = 19
    depth: int = 3
    vocab: int = 11
    tied: bool = True
    frozen: str = ""  # parameter-name substring that is frozen; "" freezes nothing
    microbatches: int = 1
    paths: tuple[tuple[int, ...], ...] = ()  # which blocks each microbatch runs, in order; (): all
    transport: str = "shared"  # or "paired"
    policy: ShardPolicy = field(default_factory=ShardPolicy)
    seed: int = 0
    uneven: bool = False  # every block is larger than the one before

    def but(self, **changes) -> Case:
        return replace(self, **changes)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 1e-6)
        self.up = Linear(width, hidden, bias=True)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tree(nn.Module):
    def __init__(self, case: Case, filled: bool = True) -> None:
        super().__init__()
        self.embed = Embedding(case.vocab, case.width)
        sizes = [case.hidden + (5 * index if case.uneven else 0) for index in range(case.depth)]
        self.blocks = nn.ModuleList(Block(case.width, size) for size in sizes)
        self.norm = RMSNorm(case.width, 1e-6)
        self.head = Linear(case.width, case.vocab)
        self.path = list(range(case.depth))  # the order in which blocks run
        if case.tied:
            self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(case.seed)
        for name, parameter in self.named_parameters():
            if filled:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            parameter.requires_grad = not (case.frozen and case.frozen in name)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index in self.path:
            x = self.blocks[index](x)
        return self.head(self.norm(x)).logsumexp(-1).sum()


def microbatch(case: Case, rank: int, index: int) -> Tensor:
    """Token ids of unequal length, a function of (rank, index) only."""
    generator = torch.Generator().manual_seed(1000 * rank + index)
    return torch.randint(case.vocab, (1 + (3 * rank + 5 * index) % 7,), generator=generator)


def reference_gradients(case: Case) -> dict[str, Tensor]:
    """Of all microbatches of all ranks, on one process, without the engine."""
    model = Tree(case)
    for rank in range(case.world_size):
        for index in range(case.microbatches):
            set_path(model, case, index)
            model(microbatch(case, rank, index)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def set_path(model: Tree, case: Case, index: int) -> None:
    model.path = list(case.paths[index] if case.paths else range(case.depth))


def connect_by(transport: str, world: World) -> Transport:
    """Shared memory, or paired sends although shared memory would work; nothing for a group of one."""
    if world.size == 1:
        return connect(world)
    if transport == "paired":
        return PairedSends(world)
    shared = SharedMemory.connect(world)
    assert shared is not None, "the machine of the tests has /dev/shm and the extension"
    return shared


def sharded(
    case: Case, world: World, precision: Precision = FP32, recorder: Recorder | None = None
) -> tuple[Tree, ShardedModel]:
    model = Tree(case)

    def connect(world: World) -> Transport:
        return connect_by(case.transport, world)

    return model, shard(model, list(model.blocks), world, case.policy, precision, recorder, connect)


def run_microbatches(model: Tree, engine: ShardedModel, case: Case, rank: int) -> None:
    """Forward and backward of one step."""
    for index in range(case.microbatches):
        engine.expect_microbatch(is_last=index == case.microbatches - 1)
        set_path(model, case, index)
        model(microbatch(case, rank, index)).backward()


def gathered_gradients(engine: ShardedModel) -> dict[str, Tensor]:
    """Full gradients, by moving them through the masters' own gather."""
    for bucket in engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    return {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


@st.composite
def policies(draw, world_size: int, replicas: bool = False) -> ShardPolicy:
    strategy = draw(st.sampled_from(["zero3", "zero3", "zero3", "zero2", "zero1", "ddp"]))
    groups = [r for r in range(1, world_size + 1) if world_size % r == 0] if replicas and strategy != "ddp" else [1]
    num_replicas = draw(st.sampled_from(groups))
    return ShardPolicy(
        strategy=strategy,
        replicas=num_replicas,
        reshard_after_forward=draw(st.booleans()),
        keep_gathered=draw(st.sampled_from([(), ("blocks.0",)])),
        prefetch_units=draw(st.integers(0, 3)),
        offload=draw(st.booleans()) and strategy in ("zero2", "zero3") and num_replicas == 1,
    )


@st.composite
def cases(draw, max_world_size: int = 4, replicas: bool = False) -> Case:
    world_size = draw(st.integers(1, max_world_size))
    depth = draw(st.integers(0, 4))
    microbatches = draw(st.integers(1, 3))
    one_path = st.lists(st.integers(0, depth - 1), max_size=depth + 1).map(tuple) if depth else st.just(())
    paths = st.lists(one_path, min_size=microbatches, max_size=microbatches).map(tuple)
    return Case(
        world_size,
        paths=draw(st.one_of(st.just(()), paths)),
        width=draw(st.integers(4, 9)),
        hidden=draw(st.integers(3, 21)),
        depth=depth,
        uneven=draw(st.booleans()),
        vocab=draw(st.integers(2, 13)),
        tied=draw(st.booleans()),
        frozen=draw(st.sampled_from(["", "", "blocks", "up", "down.weight", "norm", "blocks.0", "blocks.1", "bias"])),
        microbatches=microbatches,
        transport=draw(st.sampled_from(["shared", "paired"])),
        policy=draw(policies(world_size, replicas)),
        seed=draw(st.integers(0, 10_000)),
    )
