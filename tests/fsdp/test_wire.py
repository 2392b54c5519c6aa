"""What ranks compute with is the master as it is now, cast: also where it is the half of a master that lies there.

Oracle: the masters, gathered and cast by themselves; bit for bit, whatever has been done to them before.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.dist.collectives import barrier
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.ops.halves import write_weights_
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from tests.fsdp.oracle import on_the_wire
from tests.fsdp.trees import BF16, BF16_MASTERS, FP16, FP32, NARROW_MASTERS, Case, Tree, microbatch, sharded
from tests.ranks import run_ranks

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
PRECISIONS = [BF16, FP16, BF16_MASTERS, NARROW_MASTERS, FP32]
POLICIES = [
    ShardPolicy(),
    ShardPolicy(keep_gathered=("blocks.0",)),
    ShardPolicy(reshard_after_forward=False, step_in_backward=True),
    ShardPolicy(offload=True),
    ShardPolicy(strategy="zero2"),
    ShardPolicy(strategy="zero2", step_in_backward=True),
    ShardPolicy(strategy="zero2", offload=True),
    ShardPolicy(strategy="zero1"),
    ShardPolicy(strategy="ddp"),
]


class Failure(Exception):
    """Of a backward."""


class Run:
    """A model, and the things that a trainer does to its weights."""

    def __init__(self, world: World, case: Case, state: str) -> None:
        self.world, self.case = world, case
        self.model, self.engine = sharded(case, world)
        # With decay of some parameters, a shard is updated in several segments.
        config = OptimConfig(lr=0.05, weight_decay=0.1, state=state, max_grad_norm=None)
        self.optimizer = AdamW(self.engine.trainable_shards(), config)
        self.number = 0

    def do(self, what: str) -> None:
        self.number += 1
        getattr(self, what)()

    def backward(self) -> None:
        if self.case.policy.step_in_backward:
            self.optimizer.begin_step(1.0)
            self.engine.update_in_backward(self.optimizer.update)
        self.model(microbatch(self.case, self.world.rank, self.number)).backward()

    def step(self) -> None:
        self.backward()
        if not self.case.policy.step_in_backward:
            self.optimizer.step(1.0)
        self.engine.weights_changed()
        self.engine.clear_gradients()

    def skip(self) -> None:
        """As when fp16 gradients have overflowed."""
        if not self.case.policy.step_in_backward:
            self.backward()
        self.engine.weights_changed()
        self.engine.clear_gradients()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.model(microbatch(self.case, self.world.rank, self.number))

    def load(self) -> None:
        self.engine.load(lambda name, start, stop: self.new_values(name)[start:stop])

    def restore(self) -> None:
        """Written as a checkpoint is read: into memory, which torch does not notice, when all ranks have come."""
        barrier(self.world)
        for shard in self.optimizer.shards:
            for piece in shard.ranges:
                new = self.new_values(piece.name)[piece.param_start :][: piece.stop - piece.start]
                values = [new.to(shard.master.dtype)] if shard.lower is None else split(new)
                for tensor, value in zip(shard.halves().values(), values, strict=True):
                    tensor[piece.start : piece.stop].view(torch.uint8).numpy()[:] = value.view(torch.uint8).numpy()
        self.engine.weights_changed()

    def fail(self) -> None:
        """In the middle of backward, on all ranks alike; with step_in_backward, some weights have been updated."""

        def refuse(grad: Tensor) -> None:
            raise Failure

        hook = self.model.blocks[0].register_forward_hook(lambda module, args, out: out.register_hook(refuse) and None)
        try:
            with pytest.raises(Failure):
                self.backward()
        finally:
            hook.remove()
        self.engine.reset()

    def new_values(self, name: str) -> Tensor:
        shape = dict(Tree(self.case).named_parameters())[name].shape
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(shape.numel(), generator=generator)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    upper, lower = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    write_weights_(upper, lower, values)
    return upper, lower


def weights_in_use(run: Run) -> dict[str, Tensor]:
    """What a forward computes with."""
    seen: dict[str, Tensor] = {}

    def look(unit):
        return lambda module, args: seen.update(
            {name: p.detach().clone() for bucket in unit.buckets for name, p in bucket.params.items()}
        )

    hooks = [unit.module.register_forward_pre_hook(look(unit)) for unit in run.engine.units]
    run.evaluate()
    for hook in hooks:
        hook.remove()
    return seen


def compare_after_each(world: World, case: Case, state: str, actions: list[str]) -> list[str]:
    """What was wrong."""
    run, wrong = Run(world, case, state), []
    for number, action in enumerate(actions):
        run.do(action)
        trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
        expected = {
            name: on_the_wire(tensor, case) if name in trained else tensor.to(case.precision.wire_dtype)
            for name, tensor in run.engine.full_tensors()
        }
        for name, weight in weights_in_use(run).items():
            if not torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8)):
                wrong.append(f"{name} after {actions[: number + 1]}")
    return wrong


ACTIONS = ["step", "step", "skip", "evaluate", "load", "restore", "fail"]


@settings(max_examples=60, deadline=None, phases=PHASES)
@given(
    world_size=st.integers(1, 3),
    policy=st.sampled_from(POLICIES),
    precision=st.sampled_from(PRECISIONS),
    transport=st.sampled_from(["shared", "paired"]),
    state=st.sampled_from(["fp32", "8bit"]),
    frozen=st.sampled_from(["", "up", "embed", "norm|bias"]),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6),
)
def test_ranks_compute_with_the_masters(world_size, policy, precision, transport, state, frozen, actions) -> None:
    case = Case(world_size, policy=policy, precision=precision, transport=transport, frozen=frozen, vocab=600)
    assert run_ranks(world_size, compare_after_each, case, state, actions) == [[]] * world_size


@pytest.mark.parametrize("undo", ["load", "restore", "skip", "fail"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nothing_leaves_the_wire_behind(policy: ShardPolicy, undo: str) -> None:
    """Each of the other ways between updates, and twice in a row."""
    for transport in ("shared", "paired"):
        case = Case(2, policy=policy, precision=BF16, transport=transport)
        actions = ["step", undo, undo, "step", undo, "evaluate", "step", "fail", undo]
        assert run_ranks(2, compare_after_each, case, "fp32", actions) == [[]] * 2
