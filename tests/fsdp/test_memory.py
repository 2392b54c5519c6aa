"""Bytes that the engine holds. Oracle: the closed form of `fsdp.sharded`, written again from the policy; and every
tensor storage alive in the process, counted.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.precision import Precision
from minift.trace import Recorder
from tests.fsdp.trees import BF16, FP32, Case, microbatch, run_microbatches, sharded
from tests.ranks import run_ranks

WIDTH, HIDDEN, DEPTH, VOCAB = 8, 64, 5, 32


def storages() -> dict[int, int]:
    """{address: bytes} of every tensor storage alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type == "cpu"]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes()
    }


def held_on_rank(world: World, case: Case, precision: Precision) -> tuple[dict[str, int], int]:
    before = storages()
    model, engine = sharded(case, world, precision)
    if case.policy.step_in_backward:
        engine.update_in_backward(lambda shard: None)
    run_microbatches(model, engine, case, world.rank)
    placeholders = sum(p.itemsize for bucket in engine.buckets for p in bucket.params.values())
    after = storages()
    grown = sum(size for address, size in after.items() if address not in before) - placeholders
    return engine.held_bytes(), grown


def sizes(w: int, shard_size: int) -> tuple[int, int, int]:
    """Elements of `up` (frozen) and of the rest of a block, and of the root, with w bytes each on the wire: parameters
    begin at multiples of 64 bytes, and so do the shards; if they are trained, of 256 elements."""

    def padded(*numels: int, to: int) -> int:
        return sum(-(-numel // to) * to for numel in numels)

    up = padded(HIDDEN * WIDTH, HIDDEN, to=64 // w)
    rest = padded(WIDTH, WIDTH * HIDDEN, to=256)  # norm, down
    root = padded(VOCAB * WIDTH, WIDTH, to=256)  # embedding = head, norm
    return padded(up, to=64 // w * shard_size), padded(rest, to=256 * shard_size), padded(root, to=256 * shard_size)


def closed_form(case: Case, w: int, shard_size: int) -> dict[str, int]:
    """In bytes, with fp32 masters and w bytes on the wire."""
    up, rest, root = sizes(w, shard_size)
    alone, zero3 = shard_size == 1, case.policy.strategy == "zero3"
    all_see_it = alone or case.transport == "shared"
    trainable = DEPTH * rest + root
    slots = DEPTH if not (zero3 and case.policy.reshard_after_forward) else 1 + case.policy.prefetch_units
    shards, gathered = 0, 0
    for is_resident, lower_bytes, block, rest_of_model in (
        (all_see_it or not zero3, 0, up, 0),  # frozen, and gathered for good where weights stay
        (all_see_it, 4 - w, rest, root),
    ):
        shards += lower_bytes * (DEPTH * block + rest_of_model) // shard_size
        if is_resident:
            gathered += w * (DEPTH * block + rest_of_model)
        else:
            shards += w * (DEPTH * block + rest_of_model) // shard_size
            gathered += w * (slots * block + rest_of_model)
    if case.policy.step_in_backward:
        gradients = 2 * 4 * rest // shard_size + 4 * root // shard_size + 2 * w * rest + w * root
    elif alone or case.policy.strategy in ("ddp", "zero1"):
        gradients = 4 * trainable
    else:
        gradients = 4 * trainable // shard_size + 2 * w * rest + w * root
    return {"shards": shards, "gathered": gathered, "gradients": gradients}


@pytest.mark.parametrize("transport", ["shared", "paired"])
@pytest.mark.parametrize(
    ("precision", "world_size"),
    [(BF16, 1), (BF16, 2), (BF16, 3), (BF16, 4), (FP32, 1), (FP32, 3)],
    ids=lambda value: value if isinstance(value, int) else value.wire,
)
@pytest.mark.parametrize(
    "policy",
    [
        ShardPolicy(),
        ShardPolicy(prefetch_units=0),
        ShardPolicy(prefetch_units=2),
        ShardPolicy(reshard_after_forward=False),
        ShardPolicy(step_in_backward=True),
        ShardPolicy(strategy="zero2"),
        ShardPolicy(strategy="zero1"),
        ShardPolicy(strategy="ddp"),
    ],
    ids=lambda p: f"{p.strategy}-{p.prefetch_units}-{p.reshard_after_forward}-{p.step_in_backward}",
)
def test_memory_is_the_closed_form(policy: ShardPolicy, world_size: int, transport: str, precision: Precision) -> None:
    case = Case(world_size, WIDTH, HIDDEN, DEPTH, VOCAB, tied=True, frozen="up", transport=transport, policy=policy)
    shard_size, w = policy.shard_size(world_size), precision.wire_dtype.itemsize
    expected = closed_form(case, w, shard_size)
    for held, grown in run_ranks(world_size, held_on_rank, case, precision):
        assert held == expected
        if transport == "paired" or shard_size == 1:
            # Paired sends stage what the others send beside each reduce buffer (zero1: beside each bucket's).
            reduce_bytes = expected["gradients"]
            if policy.strategy != "zero1":
                shares = DEPTH if not policy.step_in_backward else 2
                _, rest, root = sizes(w, shard_size)
                reduce_bytes -= 4 * (shares * rest + root) // shard_size
            staging = 0 if shard_size == 1 else reduce_bytes * (shard_size - 1) // shard_size
            assert grown == sum(expected.values()) + staging


def gradients_over_a_step(world: World, case: Case) -> tuple[list[int], int]:
    """Bytes of them after a step; after one microbatch of two; after both; and cleared. What buffers take of them."""
    model, engine = sharded(case, world, BF16)
    run_microbatches(model, engine, case, world.rank)
    engine.clear_gradients()
    held = [engine.held_bytes()["gradients"]]
    for is_last in (False, True):
        engine.expect_microbatch(is_last)
        model(microbatch(case, world.rank, 0)).backward()
        held.append(engine.held_bytes()["gradients"])
    engine.clear_gradients()
    assert all(shard.grad is None for shard in engine.trainable_shards())
    assert all(parameter.grad is None for parameter in model.parameters())
    rings = {id(unit.reduce_ring): unit.reduce_ring for unit in engine.units}.values()
    return [*held, engine.held_bytes()["gradients"]], sum(len(ring.buffers) * ring.num_bytes for ring in rings)


@pytest.mark.parametrize("strategy", ["zero3", "zero2", "zero1", "ddp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_made_anew_are_there_from_backward_to_update(world_size: int, strategy: str) -> None:
    policy = ShardPolicy(strategy=strategy)
    how = {"transport": "paired", "policy": policy, "grads_anew": True}
    case = Case(world_size, WIDTH, HIDDEN, DEPTH, VOCAB, frozen="up", **how)
    all_of_them = closed_form(case, 2, policy.shard_size(world_size))["gradients"]
    for held, buffers in run_ranks(world_size, gradients_over_a_step, case):
        assert held == [buffers, all_of_them, all_of_them, buffers]


def levels_on_rank(world: World, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """The most of each kind that was lent at a time, in a step; and what there is to lend."""
    recorder = Recorder(world.rank, world.device)
    model, engine = sharded(case, world, BF16, recorder)
    run_microbatches(model, engine, case, world.rank)
    recorder.start()
    run_microbatches(model, engine, case, world.rank)
    with torch.no_grad():
        model(microbatch(case, world.rank, 0))
    trace = recorder.stop()
    most = {
        kind: max(level.num_bytes for level in trace.levels if level.kind == kind) for kind in ("gathered", "gradients")
    }
    last = {level.kind: level.num_bytes for level in trace.levels}
    assert last == {"gathered": 0, "gradients": 0}  # everything was given back
    rings = {id(r): r for unit in engine.units for r in (unit.gather_ring, unit.reduce_ring)}.values()
    there_is = {kind: sum(len(r.buffers) * r.num_bytes for r in rings if r.kind == kind) for kind in most}
    return most, there_is


@pytest.mark.parametrize("prefetch_units", [0, 1, 2])
def test_all_of_the_buffers_are_used_and_no_more(prefetch_units: int) -> None:
    policy = ShardPolicy(prefetch_units=prefetch_units)
    case = Case(2, WIDTH, HIDDEN, DEPTH, VOCAB, transport="paired", policy=policy)
    for most, there_is in run_ranks(2, levels_on_rank, case):
        assert most == there_is
