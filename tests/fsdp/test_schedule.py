"""How many collectives a step has, of what, and in which order. Oracle: the policy, counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.fsdp.transport import Buffer, PairedSends, Pending
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder
from tests.fsdp.trees import BF16, FP32, Case, Tree, microbatch, run_microbatches, sharded
from tests.ranks import run_ranks


class Watching(PairedSends):
    """Paired sends that write down what is begun."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.log: list[tuple[str, int]] = []

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        self.log.append(("gather", len(fulls)))
        return super().all_gather(buffer, fulls)

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        self.log.append(("reduce", len(fulls)))
        return super().reduce_scatter(buffer, fulls, outs, accumulate)


def watch(world: World, case: Case) -> tuple[list[list[tuple[str, int]]], list[str]]:
    """The log of each of four steps, and every gather, computation and reduction of the last one, in order."""
    model = Tree(case)
    links: list[Watching] = []

    def connect(world: World) -> Watching:
        links.append(Watching(world))
        return links[0]

    engine = shard(model, list(model.blocks), world, case.policy, FP32, connect=connect)
    story: list[str] = []
    for unit in engine.units:
        unit.start_gather = _told(story, f"gather {unit.name}", unit.start_gather)
        unit.start_reduce = _told(story, f"reduce {unit.name}", unit.start_reduce)
        unit.finish_reduce = _told(story, f"reduced {unit.name}", unit.finish_reduce)
    for name, block in model.named_modules():
        if name.endswith("down"):
            block.register_forward_hook(lambda m, a, o, name=name: story.append(f"forward {name}"))
            block.register_full_backward_pre_hook(lambda m, g, name=name: story.append(f"backward {name}"))
    logs = []
    for _ in range(4):
        links[0].log, story[:] = [], []
        for index in range(case.microbatches):
            engine.expect_microbatch(is_last=index == case.microbatches - 1)
            model(microbatch(case, world.rank, index)).backward()
        engine.weights_changed()
        engine.clear_gradients()
        logs.append(links[0].log)
    return logs, story


def _told(story: list[str], text: str, method):
    def call(*args):
        story.append(text)
        return method(*args)

    return call


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("prefetch_units", [0, 1, 2])
@pytest.mark.parametrize(
    ("fields", "gathers", "reductions_per_microbatch"),
    [
        # Four blocks (buckets: trained, frozen), one root. The block that ends the forward begins the backward.
        ({}, lambda m: m * (1 + 4 + 3), True),
        ({"reshard_after_forward": False}, lambda m: m * (1 + 4), True),
        ({"keep_gathered": ("blocks.[01]",)}, lambda m: m * (1 + 4 + 1), True),
        ({"strategy": "zero2"}, lambda m: 1 + 4, True),
        ({"strategy": "zero1"}, lambda m: 1 + 4, False),
    ],
)
def test_collectives_per_step(
    fields: dict, gathers, reductions_per_microbatch: bool, prefetch_units: int, microbatches: int
) -> None:
    policy = ShardPolicy(prefetch_units=prefetch_units, **fields)
    case = Case(2, depth=4, frozen="up", microbatches=microbatches, policy=policy)
    reductions = 5 * (microbatches if reductions_per_microbatch else 1)
    for logs, _ in run_ranks(2, watch, case):
        for log in logs[1:]:
            assert [kind for kind, _ in log].count("gather") == gathers(microbatches)
            assert [kind for kind, _ in log].count("reduce") == reductions
        first = [kind for kind, _ in logs[0]].count("gather")  # did not know yet which block comes last
        early = policy.strategy == "zero3" and policy.reshard_after_forward
        assert first == gathers(microbatches) + (1 if early else 0)


def all_reduces_on_rank(world: World, case: Case) -> int:
    model, engine = sharded(case, world)
    count = 0
    original = dist.all_reduce

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    try:
        run_microbatches(model, engine, case, world.rank)
    finally:
        dist.all_reduce = original
    return count


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_reduce_once_a_step(world_size: int) -> None:
    """DDP: gradients go through one all-reduce per bucket and step, however many microbatches it has."""
    case = Case(world_size, policy=ShardPolicy(strategy="ddp"), microbatches=2)
    assert run_ranks(world_size, all_reduces_on_rank, case) == [3 + 1] * world_size


def order(story: list[str], *wanted: str) -> bool:
    """Whether these happen in this order."""
    positions = [story.index(event) for event in wanted]
    return positions == sorted(positions)


def test_without_prefetch_a_block_is_gathered_when_the_one_before_has_ended() -> None:
    for _, story in run_ranks(2, watch, Case(2, depth=3, policy=ShardPolicy(prefetch_units=0))):
        assert order(story, "gather blocks.0", "forward blocks.0.down", "gather blocks.1", "forward blocks.1.down")
        back = story[story.index("backward blocks.2.down") :]
        assert order(back, "backward blocks.2.down", "reduce blocks.2", "gather blocks.1", "backward blocks.1.down")


def test_prefetch_gathers_the_next_block_before_the_present_one_computes() -> None:
    for _, story in run_ranks(2, watch, Case(2, depth=3, policy=ShardPolicy(prefetch_units=1))):
        assert order(story, "gather blocks.1", "forward blocks.0.down", "gather blocks.2", "forward blocks.1.down")
        back = story[story.index("forward blocks.2.down") :]
        assert order(back, "gather blocks.1", "backward blocks.2.down", "reduce blocks.2", "backward blocks.1.down")


def test_a_reduction_is_finished_when_its_buffer_is_needed_and_not_before() -> None:
    for _, story in run_ranks(2, watch, Case(2, depth=4)):
        assert order(story, "reduce blocks.3", "backward blocks.2.down", "reduced blocks.3", "backward blocks.1.down")
        assert order(story, "reduce blocks.0", "reduced blocks.1", "reduced blocks.0", "reduced ")


def recomputing(world: World, case: Case) -> list[str]:
    model = Tree(case)
    link = Watching(world)
    apply_recompute(model, list(model.blocks), case.recompute, Recorder(world.rank, world.device))
    shard(model, list(model.blocks), world, case.policy, FP32, connect=lambda world: link)
    for _ in range(3):
        link.log = []
        model(microbatch(case, world.rank, 0)).backward()
    return [kind for kind, _ in link.log]


@pytest.mark.parametrize("policy", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_recomputation_gathers_nothing_more(world_size: int, policy: str) -> None:
    """A block runs again while it is gathered for its backward: root once, blocks twice but for the last."""
    for log in run_ranks(world_size, recomputing, Case(world_size, depth=4, recompute=RecomputeConfig(policy))):
        assert (log.count("gather"), log.count("reduce")) == (1 + 4 + 3, 5)


def evaluation(world: World, case: Case) -> list[tuple[str, int]]:
    model = Tree(case)
    link = Watching(world)
    shard(model, list(model.blocks), world, case.policy, FP32, connect=lambda world: link)
    with torch.no_grad():
        for _ in range(2):
            link.log = []
            model(microbatch(case, world.rank, 0))
    return link.log


def test_an_evaluation_gathers_once() -> None:
    assert run_ranks(2, evaluation, Case(2, depth=3)) == [[("gather", 1)] * 4] * 2


def sent_on_rank(world: World, case: Case) -> tuple[int, int]:
    """What was sent in the third step; what the formula of `ShardedModel.sent_bytes` says."""
    model, engine = sharded(case, world)
    sent = []
    for _ in range(3):
        before = engine.sent_bytes()
        run_microbatches(model, engine, case, world.rank)
        engine.weights_changed()
        engine.clear_gradients()
        sent.append(engine.sent_bytes() - before)
    shard_size, replicas, zero3 = engine.shard_world.size, engine.replica_world.size, case.policy.strategy == "zero3"
    expected = 0
    for unit in engine.units:
        gathers = 1 if unit.name == "" or not zero3 else 1 if unit is engine.units[-1] else 2
        for bucket in unit.buckets:
            chunk = bucket.layout.shard_numel * (shard_size - 1)
            if not bucket.resident:
                expected += chunk * bucket.dtypes.wire.itemsize * gathers * (case.microbatches if zero3 else 1)
            if bucket.trainable:
                once = case.policy.strategy in ("zero1", "ddp")
                expected += chunk * (4 if once else bucket.dtypes.grad.itemsize) * (1 if once else case.microbatches)
                expected += 2 * bucket.grad.nbytes * (replicas - 1) // replicas
    return sent[-1], expected


@pytest.mark.parametrize(
    ("world_size", "policy"),
    [
        (2, ShardPolicy()),
        (3, ShardPolicy(strategy="zero2")),
        (2, ShardPolicy(strategy="zero1")),
        (3, ShardPolicy(strategy="ddp")),
        (4, ShardPolicy(replicas=2)),
    ],
    ids=lambda value: f"{value.strategy}-{value.replicas}" if isinstance(value, ShardPolicy) else value,
)
def test_bytes_sent_per_step(world_size: int, policy: ShardPolicy) -> None:
    case = Case(world_size, depth=3, frozen="up", microbatches=2, policy=policy, transport="paired", precision=BF16)
    for sent, expected in run_ranks(world_size, sent_on_rank, case):
        assert sent == expected > 0


def sent_in_shared_memory(world: World, case: Case) -> int:
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    return engine.sent_bytes()


def test_nothing_is_sent_between_ranks_that_share_memory() -> None:
    assert run_ranks(2, sent_in_shared_memory, Case(2, precision=BF16)) == [0, 0]
