"""What comes out of turn is either right or refused; and ranks that drift apart see the same weights.

Oracles: one process without the engine (`reference_gradients`), and hand-computed numbers where a rank is made slow.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.model.linear import Linear
from minift.precision import Precision
from minift.trace import Recorder
from tests.fsdp.oracle import reference_gradients, relative_error
from tests.fsdp.trees import (
    BF16,
    FP16,
    FP32,
    NARROW_MASTERS,
    Case,
    connect_by,
    gathered_gradients,
    microbatch,
    run_microbatches,
    sharded,
)
from tests.ranks import run_ranks

SLOW_S = 0.3


def message(function, *args) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args)
    return str(caught.value)


# Updates in backward #


def a_second_run(world: World, case: Case) -> str:
    model, engine = sharded(case, world)
    engine.update_in_backward(lambda shard: None)
    return message(run_microbatches, model, engine, case, world.rank)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("path", [(0, 1, 2, 0), (0, 1, 0), (0, 0)])
def test_with_updates_in_backward_a_unit_runs_once(world_size: int, path: tuple[int, ...]) -> None:
    case = Case(world_size, policy=ShardPolicy(step_in_backward=True), paths=(path,))
    for text in run_ranks(world_size, a_second_run, case):
        assert "with step_in_backward a unit may run only once in a step" in text


def without_an_update(world: World, case: Case) -> str:
    model, engine = sharded(case, world)
    return message(run_microbatches, model, engine, case, world.rank)


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_in_backward_need_somebody_who_updates(world_size: int) -> None:
    for text in run_ranks(world_size, without_an_update, Case(world_size, policy=ShardPolicy(step_in_backward=True))):
        assert "engine.update_in_backward()" in text


# Gradients #


def a_penalty_after_backward(world: World, case: Case) -> str:
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    return message(sum(p.square().sum() for p in model.blocks.parameters()).backward)


@pytest.mark.parametrize(("world_size", "transport"), [(1, "shared"), (2, "shared"), (2, "paired")])
def test_a_gradient_that_nobody_would_reduce_is_refused(world_size: int, transport: str) -> None:
    for text in run_ranks(world_size, a_penalty_after_backward, Case(world_size, tied=False, transport=transport)):
        assert "got a gradient outside of the backward of its unit" in text and text.startswith("blocks.")


def gradients_after_reset(world: World, case: Case) -> dict[str, Tensor]:
    model, engine = sharded(case, world)
    engine.expect_microbatch(is_last=False)
    engine.reset()
    model(microbatch(case, world.rank, 0)).backward()
    return gathered_gradients(engine)


def gradients_after_a_refused_one(world: World, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a step, and of the same after a gradient that was refused when there was no memory for gradients."""
    model, engine = sharded(case, world)
    found = []
    for _ in range(2):
        run_microbatches(model, engine, case, world.rank)
        found.append({name: gradient.clone() for name, gradient in gathered_gradients(engine).items()})
        engine.clear_gradients()
        message((3 * model.blocks[0].norm.weight).sum().backward)
        engine.reset()
    return found[0], found[1]


@pytest.mark.parametrize("grads_anew", [False, True])
def test_reset_forgets_a_gradient_that_was_refused(grads_anew: bool) -> None:
    for first, second in run_ranks(1, gradients_after_a_refused_one, Case(1, tied=False, grads_anew=grads_anew)):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("strategy", ["zero1", "ddp"])
def test_reset_forgets_which_microbatch_was_announced(strategy: str) -> None:
    case = Case(2, policy=ShardPolicy(strategy=strategy))
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_after_reset, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


class LateComer(nn.Module):
    """A block that saves a view of its weight, and that the first forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linear(8, 8), nn.Linear(8, 8), Linear(8, 8)])
        self.path = (0, 2)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.path:
            x = self.blocks[index](x)
        return x.sum()


def late_comer_on_rank(world: World) -> str:
    model = LateComer()
    engine = shard(model, list(model.blocks), world, ShardPolicy(), FP16)
    x = torch.ones(3, 8, dtype=torch.float16, requires_grad=True)
    for _ in range(2):
        model(x).backward()
        engine.clear_gradients()
    model.path = (0, 1, 2)
    return message(model, x)


def test_a_unit_that_runs_late_is_watched_too() -> None:
    for text in run_ranks(2, late_comer_on_rank):
        assert "saved a view of a gathered parameter" in text


class LocalLosses(nn.Module):
    """Units whose inputs need no gradient."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Linear(4, 4) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x).sum() for block in self.blocks)


def local_losses_on_rank(world: World, count: int, prefetch_units: int) -> str:
    model = LocalLosses(count)
    policy, recorder = ShardPolicy(prefetch_units=prefetch_units), Recorder(world.rank, world.device)
    shard(model, list(model.blocks), world, policy, FP32, recorder, lambda world: connect_by("paired", world))
    return message(model(torch.ones(2, 4)).backward)


@pytest.mark.parametrize(("count", "prefetch_units", "what"), [(3, 1, "gradients"), (2, 0, "parameters")])
def test_units_whose_end_nobody_notices_are_named(count: int, prefetch_units: int, what: str) -> None:
    for text in run_ranks(2, local_losses_on_rank, count, prefetch_units):
        assert f"has nowhere to put its {what}: the backward of ['blocks" in text


# What is recorded, and when #


def spans_on_rank(world: World) -> list[tuple[str, str]]:
    """The first of two blocks is cut off from backward, but stays gathered until then."""
    recorder = Recorder(world.rank, world.device)
    model = nn.Sequential(Linear(4, 4), Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output.detach())
    policy = ShardPolicy(reshard_after_forward=False)
    shard(model, list(model), world, policy, BF16, recorder)
    recorder.start()
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    return [(span.kind, span.name) for span in recorder.stop().spans if span.kind in ("forward", "backward")]


def test_no_backward_is_drawn_where_none_was() -> None:
    for spans in run_ranks(2, spans_on_rank):
        assert [name for kind, name in spans if kind == "forward"] == ["0", "1", ""]
        assert [name for kind, name in spans if kind == "backward"] == ["1", ""]


def order_of_sums(world: World, case: Case) -> list[str]:
    model, engine = sharded(case, world)
    story: list[str] = []
    original = dist.all_reduce
    for name, block in model.named_modules():
        if name.endswith("down"):
            block.register_full_backward_pre_hook(lambda m, g, name=name: story.append(name.split(".")[1]))
    dist.all_reduce = lambda *args, **kwargs: (story.append("sum"), original(*args, **kwargs))[1]
    try:
        run_microbatches(model, engine, case, world.rank)
    finally:
        dist.all_reduce = original
    return story


def test_ddp_sums_a_block_while_the_next_goes_backward() -> None:
    story = ["2", "sum", "1", "sum", "0", "sum", "sum"]
    assert run_ranks(2, order_of_sums, Case(2, depth=3, policy=ShardPolicy(strategy="ddp"))) == [story] * 2


def names_of_shards(world: World) -> list[str]:
    model = nn.Module()
    model.root, model.other = Linear(4, 4), Linear(4, 4)
    return [s.name for s in shard(model, [model.root], world, ShardPolicy(), FP32).trainable_shards()]


def test_a_unit_may_be_called_root() -> None:
    (names,) = run_ranks(1, names_of_shards)
    assert len(set(names)) == 2


# Ranks that drift apart #


def three_ones(world: World, precision, policy) -> tuple[nn.Module, ShardedModel]:
    """Three 4 x 4 unit matrices: ones in, ones out."""
    model = nn.Sequential(*(Linear(4, 4) for _ in range(3)))
    for block in model:
        nn.init.eye_(block.weight)
    return model, shard(model, list(model), world, policy, precision)


def sleep_in(model: nn.Module, world: World, slow_rank: int):
    def sleep(*_) -> None:
        time.sleep(SLOW_S if world.rank == slow_rank else 0.0)

    return model[0].register_forward_hook(sleep)


def add_one(engine: ShardedModel) -> None:
    """As an optimizer does it."""
    for flat_shard in engine.trainable_shards():
        flat_shard.set_weights(flat_shard.weights() + 1.0)
    engine.weights_changed()


def ones(precision: Precision) -> Tensor:
    return torch.ones(1, 4, dtype=precision.wire_dtype)


def forward_before_the_update(world: World, precision, policy) -> tuple[float, float]:
    """backward, an evaluation that takes one rank long, the update, an evaluation."""
    model, engine = three_ones(world, precision, policy)
    model(ones(precision)).sum().backward()
    hook = sleep_in(model, world, slow_rank=1)
    with torch.no_grad():
        before = model(ones(precision)).mean()
        hook.remove()
        add_one(engine)
        return float(before), float(model(ones(precision)).mean())


def forward_after_a_slow_update(world: World, precision, policy) -> float:
    model, engine = three_ones(world, precision, policy)
    model(ones(precision)).sum().backward()
    time.sleep(SLOW_S if world.rank == 1 else 0.0)
    add_one(engine)
    with torch.no_grad():
        return float(model(ones(precision)).mean())


def forward_before_a_load(world: World, precision, policy) -> tuple[float, float]:
    model, engine = three_ones(world, precision, policy)
    hook = sleep_in(model, world, slow_rank=1)
    with torch.no_grad():
        before = model(ones(precision)).mean()
        hook.remove()
        engine.load(lambda name, start, stop: torch.full((stop - start,), 2.0))
        return float(before), float(model(ones(precision)).mean())


@pytest.mark.parametrize(
    ("precision", "policy"),
    [
        (FP32, ShardPolicy()),
        (BF16, ShardPolicy()),
        (NARROW_MASTERS, ShardPolicy()),
        (NARROW_MASTERS, ShardPolicy(strategy="zero2")),
        (NARROW_MASTERS, ShardPolicy(reshard_after_forward=False)),
    ],
    ids=["resident", "resident halves", "gathered", "kept until the update", "kept until backward"],
)
def test_no_rank_reads_weights_that_another_is_writing(precision, policy) -> None:
    """(I + 1)³ of ones is 5³; (2 · 1)³ of ones is 8³."""
    assert run_ranks(2, forward_before_the_update, precision, policy) == [(1.0, 125.0)] * 2
    assert run_ranks(2, forward_after_a_slow_update, precision, policy) == [125.0] * 2
    assert run_ranks(2, forward_before_a_load, precision, policy) == [(1.0, 512.0)] * 2
