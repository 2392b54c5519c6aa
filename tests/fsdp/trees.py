"""Random module trees, their data, and the engine that runs them: what tests of the engine draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.dist.collectives import gather_objects
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.fsdp.shared_memory import SharedMemory
from minift.fsdp.transport import PairedSends, Transport
from minift.model.cheap import CheapOps
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.model.norm import RMSNorm
from minift.precision import Precision
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder
from tests.ranks import DEVICE

FP32 = Precision(master="float32", wire="float32", reduce="float32")
BF16 = Precision(master="float32", wire="bfloat16", reduce="float32")
FP16 = Precision(master="float32", wire="float16", reduce="float32")
BF16_MASTERS = Precision(master="bfloat16", wire="bfloat16", reduce="bfloat16", stochastic_rounding=True)
NARROW_MASTERS = Precision(master="bfloat16", wire="float32", reduce="float32", stochastic_rounding=True)


@dataclass(frozen=True)
class Case:
    """A random module tree, its data, and how it is sharded."""

    world_size: int
    width: int = 7
    hidden: int = 19
    depth: int = 3
    vocab: int = 11
    tied: bool = True
    frozen: str = ""  # parameters whose names contain one of these, separated by "|"; "" freezes nothing
    microbatches: int = 1
    paths: tuple[tuple[int, ...], ...] = ()  # which blocks each microbatch runs, in order; (): all
    transport: str = "shared"  # or "paired"
    policy: ShardPolicy = field(default_factory=ShardPolicy)
    seed: int = 0
    uneven: bool = False  # every block is larger than the one before
    precision: Precision = FP32
    recompute: RecomputeConfig = RecomputeConfig()
    dropout: float = 0.0
    grads_anew: bool = False  # as on a GPU; not in shared memory
    distinct: bool = False  # no token occurs twice in a microbatch

    def but(self, **changes) -> Case:
        return replace(self, **changes)


class Block(CheapOps):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = RMSNorm(width, 1e-6)
        self.up = Linear(width, hidden, bias=True)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.cheap(torch.tanh, self.up(self.cheap(self.norm, x)))
        return x + F.dropout(self.down(hidden), self.dropout)


class Tree(nn.Module):
    def __init__(self, case: Case, filled: bool = True) -> None:
        super().__init__()
        self.embed = Embedding(case.vocab, case.width)
        sizes = [case.hidden + (5 * index if case.uneven else 0) for index in range(case.depth)]
        self.blocks = nn.ModuleList(Block(case.width, size, case.dropout) for size in sizes)
        self.norm = RMSNorm(case.width, 1e-6)
        self.head = Linear(case.width, case.vocab)
        self.path = list(range(case.depth))  # the order in which blocks run
        if case.tied:
            self.head.weight = self.embed.weight
        frozen = [part for part in case.frozen.split("|") if part]
        generator = torch.Generator().manual_seed(case.seed)
        for name, parameter in self.named_parameters():
            if filled:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            parameter.requires_grad = not any(part in name for part in frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index in self.path:
            x = self.blocks[index](x)
        return self.head(self.norm(x)).logsumexp(-1).sum()


def microbatch(case: Case, rank: int, index: int) -> Tensor:
    """Token ids of unequal length where ranks compute, a function of (rank, index) only."""
    generator = torch.Generator().manual_seed(1000 * rank + index)
    length = 1 + (3 * rank + 5 * index) % 7
    if case.distinct:
        return torch.randperm(case.vocab, generator=generator)[:length].to(DEVICE)
    return torch.randint(case.vocab, (length,), generator=generator).to(DEVICE)


def set_path(model: Tree, case: Case, index: int) -> None:
    model.path = list(case.paths[index] if case.paths else range(case.depth))


def loss_of(model: Tree, case: Case, rank: int, index: int) -> Tensor:
    """Of a microbatch. What dropout drops is a function of (rank, index) too."""
    set_path(model, case, index)
    torch.manual_seed(1000 * rank + index)
    return model(microbatch(case, rank, index))


def connect_by(transport: str, world: World) -> Transport:
    """Shared memory, or paired sends although shared memory would work; nothing for a group of one, and on a GPU what
    there is."""
    if world.size == 1 or world.device.type == "cuda":
        return connect(world)
    if transport == "paired":
        return PairedSends(world)
    shared = SharedMemory.connect(world)
    assert shared is not None, "the machine of the tests has /dev/shm and the extension"
    return shared


def sharded(
    case: Case, world: World, precision: Precision | None = None, recorder: Recorder | None = None
) -> tuple[Tree, ShardedModel]:
    """Assembled in the order of minift/build.py. precision: instead of the case's."""
    model = Tree(case)
    recorder = recorder or Recorder(world.rank, world.device)
    apply_recompute(model, list(model.blocks), case.recompute, recorder)

    def connect(world: World) -> Transport:
        return connect_by(case.transport, world)

    units, precision = list(model.blocks), precision or case.precision
    is_anew = world.device.type == "cuda" or (case.grads_anew and (case.transport == "paired" or world.size == 1))
    with mock.patch("minift.fsdp.bucket.are_grads_made_anew", lambda device: is_anew):
        return model, shard(model, units, world, case.policy, precision, recorder, connect)


def run_microbatches(model: Tree, engine: ShardedModel, case: Case, rank: int) -> None:
    """Forward and backward of one step."""
    for index in range(case.microbatches):
        engine.expect_microbatch(is_last=index == case.microbatches - 1)
        loss_of(model, case, rank, index).backward()


def gathered_gradients(engine: ShardedModel) -> dict[str, Tensor]:
    """Full gradients, put together from the shards of all ranks."""
    gradients = {}
    for bucket in engine.buckets:
        if bucket.trainable:
            full = torch.cat(gather_objects(bucket.grad.cpu().clone(), engine.shard_world))
            views = zip(bucket.layout.spans, bucket.layout.views(full), strict=True)
            gradients |= {span.name: view for span, view in views}
    return gradients


@st.composite
def policies(draw, world_size: int, replicas: bool = False) -> ShardPolicy:
    strategy = draw(st.sampled_from(["zero3", "zero3", "zero3", "zero2", "zero1", "ddp"]))
    groups = [r for r in range(1, world_size + 1) if world_size % r == 0] if replicas and strategy != "ddp" else [1]
    num_replicas = draw(st.sampled_from(groups))
    offload = draw(st.booleans()) and strategy in ("zero2", "zero3") and num_replicas == 1
    return ShardPolicy(
        strategy=strategy,
        replicas=num_replicas,
        reshard_after_forward=draw(st.booleans()),
        keep_gathered=draw(st.sampled_from([(), ("blocks.0",)])),
        prefetch_units=draw(st.integers(0, 3)),
        offload=offload,
    )


# With a frozen embedding one trained block has inputs that need no gradient, the first. Something is always trained.
FROZEN = ["", "", "blocks", "up", "down.weight", "norm", "blocks.0", "blocks.1", "bias", "embed", "embed|blocks.0"]
RECOMPUTES = st.builds(
    RecomputeConfig, policy=st.sampled_from(["none", "full", "selective", "offload"]), every=st.integers(1, 3)
)


@st.composite
def cases(draw, max_world_size: int = 4, replicas: bool = False, precisions: Sequence[Precision] = (FP32,)) -> Case:
    world_size = draw(st.integers(1, max_world_size))
    depth = draw(st.integers(0, 4))
    microbatches = draw(st.integers(1, 3))
    one_path = st.lists(st.integers(0, depth - 1), max_size=depth + 1).map(tuple) if depth else st.just(())
    paths = st.lists(one_path, min_size=microbatches, max_size=microbatches).map(tuple)
    frozen, policy = draw(st.sampled_from(FROZEN)), draw(policies(world_size, replicas))
    takes_turns = policy.strategy == "zero3" and policy.reshard_after_forward and not policy.keep_gathered
    has_frozen = depth > 0 and frozen in ("blocks", "up", "down.weight", "blocks.0", "embed|blocks.0")
    if takes_turns and has_frozen and not policy.offload and draw(st.booleans()):
        policy = replace(policy, offload_frozen=("blocks.0",))
    return Case(
        world_size,
        paths=draw(st.one_of(st.just(()), paths)),
        width=draw(st.integers(4, 9)),
        hidden=draw(st.integers(3, 21)),
        depth=depth,
        uneven=draw(st.booleans()),
        vocab=draw(st.integers(2, 13)),
        tied=draw(st.booleans()),
        frozen=frozen,
        microbatches=microbatches,
        transport=draw(st.sampled_from(["shared", "paired"])),
        policy=policy,
        seed=draw(st.integers(0, 10_000)),
        precision=draw(st.sampled_from(precisions)),
        recompute=draw(RECOMPUTES),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        grads_anew=draw(st.booleans()),
    )
