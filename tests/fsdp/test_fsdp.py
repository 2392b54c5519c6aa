"""The engine on 1, 2 and 3 gloo processes.

Oracle: the same module on one process, unsharded, over all microbatches of all ranks. In fp32 the only difference is
the order in which gradients of different microbatches are added; with at most 9 summands of similar size the relative
error (largest absolute difference over largest value) is a few ulp, 9 · 2⁻²⁴ ≈ 5e-7 < 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, collectives, shard
from minift.fsdp.clip import clip_grads_, grad_norm
from minift.fsdp.flat import FlatLayout
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.model.norm import RMSNorm
from minift.precision import Precision
from tests.ranks import run_ranks

FP32 = Precision(master="float32", wire="float32", reduce="float32")


@dataclass(frozen=True)
class Case:
    """A random module tree and its data."""

    world_size: int
    width: int
    hidden: int
    depth: int
    vocab: int
    tied: bool
    frozen: str  # parameter-name substring that is frozen; "" freezes nothing
    microbatches: int
    reshard_after_forward: bool
    seed: int


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 1e-6)
        self.up = Linear(width, hidden, bias=True)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tree(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed = Embedding(case.vocab, case.width)
        self.blocks = nn.ModuleList(Block(case.width, case.hidden) for _ in range(case.depth))
        self.norm = RMSNorm(case.width, 1e-6)
        self.head = Linear(case.width, case.vocab)
        if case.tied:
            self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(case.seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = not (case.frozen and case.frozen in name)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).logsumexp(-1).sum()


def microbatch(case: Case, rank: int, index: int) -> Tensor:
    """Token ids of unequal length, a function of (rank, index) only."""
    generator = torch.Generator().manual_seed(1000 * rank + index)
    return torch.randint(case.vocab, (1 + (3 * rank + 5 * index) % 7,), generator=generator)


def reference_gradients(case: Case) -> dict[str, Tensor]:
    model = Tree(case)
    for rank in range(case.world_size):
        for index in range(case.microbatches):
            model(microbatch(case, rank, index)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def sharded(case: Case, world: World, precision: Precision = FP32) -> tuple[Tree, ShardedModel]:
    model = Tree(case)
    return model, shard(model, list(model.blocks), world, ShardPolicy(case.reshard_after_forward), precision)


def gathered_gradients(engine: ShardedModel) -> dict[str, Tensor]:
    """Full gradients, by moving them through the masters' own gather."""
    for bucket in engine.buckets:
        if bucket.trainable:
            bucket.shard.copy_(bucket.grad)
    return {name: tensor.clone() for name, tensor in engine.full_tensors(trainable_only=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def gradients_on_rank(world: World, case: Case, precision: Precision = FP32) -> dict[str, Tensor]:
    model, engine = sharded(case, world, precision)
    for index in range(case.microbatches):
        model(microbatch(case, world.rank, index)).backward()
    assert engine.parameters_without_grad() == []
    return gathered_gradients(engine)


cases = st.builds(
    Case,
    world_size=st.integers(1, 3),
    width=st.integers(4, 9),
    hidden=st.integers(3, 21),
    depth=st.integers(0, 3),
    vocab=st.integers(2, 13),
    tied=st.booleans(),
    frozen=st.sampled_from(["", "blocks", "up", "down.weight", "norm", "blocks.0", "bias"]),
    microbatches=st.integers(1, 3),
    reshard_after_forward=st.booleans(),
    seed=st.integers(0, 10_000),
)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_gradients_equal_one_process(case: Case) -> None:
    expected = reference_gradients(case)
    for gradients in run_ranks(case.world_size, gradients_on_rank, case):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bf16_on_the_wire(world_size: int) -> None:
    """Oracle: the unsharded module in bf16, one backward per microbatch, gradients added in fp32: equal roundings."""
    case = Case(world_size, 8, 24, 3, 11, tied=True, frozen="up", microbatches=2, reshard_after_forward=True, seed=4)
    expected: dict[str, Tensor] = {}
    for rank in range(world_size):
        for index in range(case.microbatches):
            model = Tree(case).to(torch.bfloat16)
            model(microbatch(case, rank, index)).backward()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    expected[name] = expected.get(name, 0.0) + parameter.grad.float()
    for gradients in run_ranks(world_size, gradients_on_rank, case, Precision()):
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert relative_error(gradient, expected[name]) <= 1e-6, name


class Detached(nn.Module):
    """Backward reaches the last block only; one parameter of it is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linear(4, 4), Linear(4, 4)])
        self.blocks[1].spare = nn.Parameter(torch.zeros(3))
        for block in self.blocks:
            nn.init.ones_(block.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x).detach()).sum()


def unreached_on_rank(world: World) -> list[str]:
    model = Detached()
    engine = shard(model, list(model.blocks), world, ShardPolicy(), FP32)
    for _ in range(2):
        model(torch.ones(2, 4)).backward()
    return engine.parameters_without_grad()


def test_parameters_that_backward_does_not_reach_are_named() -> None:
    assert run_ranks(2, unreached_on_rank) == [["blocks.0.weight", "blocks.1.spare"]] * 2


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


def gradients_after_an_exception(world: World, case: Case) -> dict[str, Tensor]:
    """An exception inside the second block's backward, the same on every rank; then an ordinary step."""
    model, engine = sharded(case, world)
    hook = model.blocks[1].norm.register_forward_hook(lambda module, args, output: Explodes.apply(output))
    with pytest.raises(ArithmeticError):
        model(microbatch(case, world.rank, 0)).backward()
    hook.remove()
    engine.reset()
    for index in range(case.microbatches):
        model(microbatch(case, world.rank, index)).backward()
    return gathered_gradients(engine)


@pytest.mark.parametrize("reshard", [True, False])
def test_the_engine_survives_an_exception_in_backward(reshard: bool) -> None:
    case = Case(2, 7, 19, 3, 11, tied=True, frozen="", microbatches=2, reshard_after_forward=reshard, seed=2)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_after_an_exception, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


CASE = Case(3, 7, 19, 3, 11, tied=True, frozen="up", microbatches=2, reshard_after_forward=True, seed=0)


def counts_on_rank(world: World, case: Case) -> dict[str, int]:
    model, engine = sharded(case, world)
    counts = {"all_gather": 0, "reduce_scatter": 0}
    originals = {name: getattr(collectives, name) for name in counts}

    def counting(name: str):
        def call(full: Tensor, world: World) -> collectives.Pending:
            counts[name] += 1
            return originals[name](full, world)

        return call

    try:
        for name in counts:
            setattr(collectives, name, counting(name))
        model(microbatch(case, world.rank, 0)).backward()
    finally:
        for name in counts:
            setattr(collectives, name, originals[name])
    return counts


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_per_step(world_size: int, reshard: bool) -> None:
    """Blocks have two buckets (frozen `up`, the rest); the root one. Gathers: root once, blocks twice if resharded."""
    case = Case(world_size, 7, 19, 3, 11, tied=True, frozen="up", microbatches=1, reshard_after_forward=reshard, seed=0)
    for counts in run_ranks(world_size, counts_on_rank, case):
        assert counts == {"all_gather": 1 + 3 * 2 * (2 if reshard else 1), "reduce_scatter": 1 + 3}


def held_on_rank(world: World, case: Case) -> dict[str, int]:
    _, engine = sharded(case, world, Precision(wire="bfloat16"))
    return engine.held_bytes()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_memory_is_the_closed_form(world_size: int) -> None:
    """fp32 masters and gradients of the trainable part / N, bf16 frozen part / N, one slot of one block, one root slot.

    On one process the frozen bf16 bucket is resident: it needs no place in the slot.
    """
    case = Case(world_size, 8, 64, 5, 32, tied=True, frozen="up", microbatches=1, reshard_after_forward=True, seed=0)
    align = 32 * world_size  # elements: 64 bytes of bf16 per rank
    up = 64 * 8 + 64  # weight, bias: both multiples of 32 elements, so there are no gaps
    rest = 32 + 8 * 64  # norm weight of 8 padded to 32, down
    root = 32 * 8 + 32  # embedding = head, final norm padded

    def padded(numel: int) -> int:
        return -(-numel // align) * align

    trainable = 5 * padded(rest) + padded(root)
    slot = 2 * padded(rest) + (0 if world_size == 1 else 2 * padded(up))
    for held in run_ranks(world_size, held_on_rank, case):
        assert held["shards"] == (8 * trainable + 2 * 5 * padded(up)) // world_size
        assert held["gathered"] == slot + 2 * padded(root)
        assert held["gradients"] == 4 * max(padded(rest), padded(root))


def gradients_with_poisoned_ring(world: World, case: Case) -> dict[str, Tensor]:
    """Overwrite the ring between forward and backward, as the next unit would."""
    model, engine = sharded(case, world)
    loss = model(microbatch(case, world.rank, 0))
    for slot in engine.block_ring.slots:
        slot.fill_(0xFF)  # NaN in fp32
    loss.backward()
    return gathered_gradients(engine)


def test_nothing_saved_for_backward_lives_in_the_ring() -> None:
    case = Case(2, 7, 19, 3, 11, tied=False, frozen="", microbatches=1, reshard_after_forward=True, seed=1)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_with_poisoned_ring, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


class TorchLinearTree(nn.Module):
    """A block that falls into the trap: `nn.Linear` saves a transposed view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def run_torch_linear(world: World) -> str:
    model = TorchLinearTree()
    shard(model, list(model.blocks), world, ShardPolicy(), FP32)
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(3, 8, requires_grad=True))
    return str(caught.value)


def test_saving_a_view_of_a_gathered_parameter_is_refused() -> None:
    for message in run_ranks(2, run_torch_linear):
        assert "saved a view of a gathered parameter" in message and "(8, 8)" in message


def placeholders_on_rank(world: World, case: Case) -> None:
    model, engine = sharded(case, world)
    shapes = {name: p.shape for name, p in Tree(case).named_parameters()}
    model(microbatch(case, world.rank, 0)).backward()
    with torch.no_grad():
        model(microbatch(case, world.rank, 1))
    for name, parameter in model.named_parameters():
        assert parameter.shape == shapes[name]
        assert parameter.isnan().all()
        assert parameter.untyped_storage().nbytes() == parameter.itemsize


def test_between_steps_parameters_are_nan_and_hold_no_memory() -> None:
    run_ranks(2, placeholders_on_rank, CASE)


def norm_and_clip_on_rank(world: World, case: Case, max_norm: float) -> tuple[float, dict[str, Tensor]]:
    model, engine = sharded(case, world)
    model(microbatch(case, world.rank, 0)).backward()
    shards = engine.trainable_shards()
    norm = grad_norm(shards, world)
    clip_grads_(shards, norm, max_norm)
    return float(norm), gathered_gradients(engine)


@settings(max_examples=10, deadline=None)
@given(case=cases, share=st.sampled_from([1e-3, 0.3, 0.9, 2.0]))
def test_clipping_against_torch(case: Case, share: float) -> None:
    """Clip at a share of the norm. Oracle: torch.nn.utils.clip_grad_norm_ on one process; norms add squares in fp32."""
    case = Case(**{**case.__dict__, "microbatches": 1})
    expected = reference_gradients(case)
    parameters = [nn.Parameter(torch.empty_like(g)) for g in expected.values()]
    for parameter, gradient in zip(parameters, expected.values(), strict=True):
        parameter.grad = gradient
    max_norm = share * float(torch.nn.utils.get_total_norm(expected.values()))
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    for ours, gradients in run_ranks(case.world_size, norm_and_clip_on_rank, case, max_norm):
        assert ours == pytest.approx(norm, rel=1e-6)
        for name, parameter in zip(expected, parameters, strict=True):
            assert relative_error(gradients[name], parameter.grad) <= 2e-6, name


def padding_on_rank(world: World, case: Case) -> float:
    """Largest gradient outside of every parameter. The packing buffer is shared: each unit finds another's values."""
    model, engine = sharded(case, world)
    for index in range(2):
        model(microbatch(case, world.rank, index)).backward()
    largest = 0.0
    for flat_shard in engine.trainable_shards():
        outside = torch.ones_like(flat_shard.grad, dtype=torch.bool)
        for r in flat_shard.ranges:
            outside[r.start : r.stop] = False
        largest = max([largest, *flat_shard.grad[outside].abs().tolist()])
    return largest


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padding_has_no_gradient(world_size: int) -> None:
    case = Case(world_size, 7, 19, 3, 11, tied=False, frozen="", microbatches=2, reshard_after_forward=True, seed=0)
    assert run_ranks(world_size, padding_on_rank, case) == [0.0] * world_size


def load_on_rank(world: World, case: Case) -> tuple[int, dict[str, Tensor]]:
    """Meta construction; each rank asks for its own ranges only."""
    values = {name: p.detach().reshape(-1) for name, p in Tree(case).named_parameters()}
    trainable = {name for name, p in Tree(case).named_parameters() if p.requires_grad}
    with torch.device("meta"):
        model = nn.ModuleDict({"tree": _meta_tree(case)})
    for name, parameter in model["tree"].named_parameters():
        parameter.requires_grad = name in trainable
    engine = shard(model["tree"], list(model["tree"].blocks), world, ShardPolicy(), FP32)
    asked = 0

    def read(name: str, start: int, stop: int) -> Tensor:
        nonlocal asked
        asked += stop - start
        return values[name][start:stop]

    engine.load(read)
    return asked, {name: tensor.clone() for name, tensor in engine.full_tensors()}


def _meta_tree(case: Case) -> nn.Module:
    tree = Tree.__new__(Tree)
    nn.Module.__init__(tree)
    tree.embed = Embedding(case.vocab, case.width)
    tree.blocks = nn.ModuleList(Block(case.width, case.hidden) for _ in range(case.depth))
    tree.norm = RMSNorm(case.width, 1e-6)
    tree.head = Linear(case.width, case.vocab)
    if case.tied:
        tree.head.weight = tree.embed.weight
    return tree


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_meta_construction_reads_every_element_once(world_size: int) -> None:
    case = Case(world_size, 7, 19, 3, 11, tied=True, frozen="up", microbatches=1, reshard_after_forward=True, seed=5)
    expected = {name: p.detach() for name, p in Tree(case).named_parameters()}
    results = run_ranks(world_size, load_on_rank, case)
    assert sum(asked for asked, _ in results) == sum(p.numel() for p in expected.values())
    for _, tensors in results:
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=6),
    world_size=st.integers(1, 5),
    itemsize=st.sampled_from([1, 2, 4]),
)
def test_layout_covers_every_element_exactly_once(shapes: list[list[int]], world_size: int, itemsize: int) -> None:
    """Brute force: paint every element of every parameter through the ranks' ranges."""
    named = {f"p{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    layout = FlatLayout.plan(named, world_size, itemsize)
    painted = {name: [0] * shape.numel() for name, shape in named.items()}
    for rank in range(world_size):
        for r in layout.local_ranges(rank):
            assert 0 <= r.start < r.stop <= layout.shard_numel
            for i in range(r.stop - r.start):
                painted[r.name][r.param_start + i] += 1
    assert all(count == 1 for counts in painted.values() for count in counts)
    assert all(span.start * itemsize % 64 == 0 for span in layout.spans)
    assert layout.full_numel * itemsize % (64 * world_size) == 0
