"""What the recorder notes, and what the engine notes in it.

Oracles: the policy (how often a unit is gathered, and what runs when); the closed form of minift/fsdp/sharded.py for
the bytes. Nothing here compares durations: marks of one process are in the order in which it did things.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings

from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.fsdp.unit import aligned
from minift.trace import Recorder, Span, Trace
from tests.fsdp.trees import FP16, Case, Tree, cases, connect_by, run_microbatches
from tests.ranks import run_ranks

CPU = torch.device("cpu")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# The recorder #


@pytest.mark.parametrize("device", DEVICES)
def test_times_are_in_the_order_of_events(device: str) -> None:
    recorder = Recorder(3, torch.device(device))
    recorder.start()
    with recorder.during("compute", "forward", "outer"):
        torch.ones(1000, device=device).sum()
        mark = recorder.mark()
        recorder.change_level("gathered", 100)
        recorder.span("all-gather", "all-gather", "inner", mark)
        recorder.change_level("gathered", -40)
    trace = recorder.stop()
    inner, outer = trace.spans
    assert trace.rank == 3 and (inner.name, outer.name) == ("inner", "outer")
    assert [level.num_bytes for level in trace.levels] == [100, 60]
    first, second = (level.time_s for level in trace.levels)
    times = [0, outer.start_s, inner.start_s, first, inner.stop_s, second, outer.stop_s]
    assert times == sorted(times)


def test_off_means_nothing_is_noted() -> None:
    recorder = Recorder(0, CPU)

    def use() -> None:
        recorder.span("compute", "forward", "a", recorder.mark())
        with recorder.during("compute", "wait", "a"):
            recorder.change_level("gathered", 7)

    use()
    assert recorder.mark() is None
    assert recorder.stop() == Trace(0, [], [])
    early = recorder.mark()
    recorder.start()
    recorder.span("compute", "forward", "began before the start", early)
    trace = recorder.stop()
    assert trace.spans == []
    assert [(level.kind, level.num_bytes) for level in trace.levels] == [("gathered", 7)]  # in use when it began
    use()
    assert recorder.stop() == trace
    recorder.start()
    assert [(level.kind, level.num_bytes) for level in recorder.stop().levels] == [("gathered", 14)]


# The engine #


def trace_on_rank(world: World, case: Case, record: bool = True) -> tuple[Trace, dict[str, int], list[str]]:
    """The second step of a run, because the first learns the order; the closed form; units that are gathered at all.
    With an fp16 wire, whose masters have to be gathered whatever the transport."""
    model = Tree(case)
    recorder = Recorder(world.rank, world.device)
    engine = shard(
        model, list(model.blocks), world, case.policy, FP16, recorder, lambda world: connect_by(case.transport, world)
    )
    for number in range(2):
        if record and number == 1:
            recorder.start()
        run_microbatches(model, engine, case, world.rank)
        engine.weights_changed()
        engine.clear_gradients()
    gathered = [unit.name for unit in engine.units if any(not bucket.resident for bucket in unit.buckets)]
    return recorder.stop(), closed_form(engine), gathered


def closed_form(engine: ShardedModel) -> dict[str, int]:
    """Most bytes in buffers that are lent, by the formulas in minift/fsdp/sharded.py."""
    policy, root, blocks = engine.policy, engine.units[0], engine.units[1:]
    full = {unit: sum(aligned(bucket.gather_bytes) for bucket in unit.buckets) for unit in engine.units}
    grads = {unit: sum(aligned(bucket.reduce_bytes) for bucket in unit.trainable) for unit in engine.units}
    if policy.strategy != "zero3":
        gathered = sum(full.values())
    else:
        kept = [unit for unit in blocks if policy.keeps_until_backward(unit.name)]
        passing = [full[unit] for unit in blocks if unit not in kept]
        ring = min(1 + policy.prefetch_units, len(passing))
        gathered = ring * max(passing, default=0) + sum(full[unit] for unit in kept) + full[root]
    if policy.strategy in ("zero1", "ddp") or (engine.shard_world.size == 1 and not policy.offload):
        gradients = 0  # summed up where they stay
    else:
        reduced = [grads[unit] for unit in blocks if grads[unit]]
        gradients = min(2, len(reduced)) * max(reduced, default=0) + grads[root]
    return {"gathered": gathered, "gradients": gradients}


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(case=cases(max_world_size=2))
def test_of_any_step(case: Case) -> None:
    for rank, (trace, most_bytes, _) in enumerate(run_ranks(case.world_size, trace_on_rank, case)):
        assert trace.rank == rank
        root_forwards = [s for s in trace.spans if s.kind == "forward" and s.name == ""]
        root_backwards = [s for s in trace.spans if s.kind == "backward" and s.name == ""]
        assert len(root_forwards) == case.microbatches
        for span in trace.spans:
            assert 0 <= span.start_s <= span.stop_s
            assert (span.lane == "compute") == (span.kind in ("forward", "backward", "wait"))
            if span.name != "" and span.kind in ("forward", "backward"):
                outer = root_forwards if span.kind == "forward" else root_backwards
                assert any(o.start_s <= span.start_s and span.stop_s <= o.stop_s for o in outer), span
        in_use = {"gathered": 0, "gradients": 0}
        for level in trace.levels:
            in_use[level.kind] = level.num_bytes
            assert 0 <= level.num_bytes <= most_bytes[level.kind], level
        assert in_use == {"gathered": 0, "gradients": 0}  # weights_changed came last
        assert [level.time_s for level in trace.levels] == sorted(level.time_s for level in trace.levels)


@pytest.mark.parametrize("transport", ["shared", "paired"])
@pytest.mark.parametrize("prefetch_units", [0, 1, 2])
def test_buffers_reach_the_closed_form(prefetch_units: int, transport: str) -> None:
    policy = ShardPolicy(prefetch_units=prefetch_units)
    for trace, most_bytes, _ in run_ranks(2, trace_on_rank, Case(2, depth=5, transport=transport, policy=policy)):
        peaks = {kind: max(level.num_bytes for level in trace.levels if level.kind == kind) for kind in most_bytes}
        assert peaks == most_bytes


@pytest.mark.parametrize("transport", ["shared", "paired"])
@pytest.mark.parametrize(
    ("policy", "microbatches", "block", "last_block", "root", "reduces"),
    [
        (ShardPolicy(), 1, 2, 1, 1, 1),  # the block that ends the forward begins the backward
        (ShardPolicy(), 3, 6, 3, 3, 3),
        (ShardPolicy(prefetch_units=0), 2, 4, 2, 2, 2),
        (ShardPolicy(prefetch_units=3), 2, 4, 2, 2, 2),
        (ShardPolicy(reshard_after_forward=False), 2, 2, 2, 2, 2),
        (ShardPolicy(strategy="zero2"), 2, 1, 1, 1, 2),
        (ShardPolicy(strategy="zero1"), 2, 1, 1, 1, 1),
        (ShardPolicy(strategy="ddp"), 2, 1, 1, 1, 0),
    ],
)
def test_collectives_are_as_many_as_the_policy_says(
    policy: ShardPolicy, microbatches: int, block: int, last_block: int, root: int, reduces: int, transport: str
) -> None:
    case = Case(2, depth=4, microbatches=microbatches, transport=transport, policy=policy)
    units = ["", *(f"blocks.{index}" for index in range(4))]
    for trace, _, gathered in run_ranks(2, trace_on_rank, case):
        assert gathered == units
        counts = [len(spans_of(trace, "all-gather", name)) for name in units]
        assert counts == [root, block, block, block, last_block]
        assert [len(spans_of(trace, "reduce-scatter", name)) for name in units] == [reduces] * 5
        assert [len(spans_of(trace, "all-reduce", name)) for name in units] == [int(policy.strategy == "ddp")] * 5


@pytest.mark.parametrize("transport", ["shared", "paired"])
@pytest.mark.parametrize("prefetch_units", [0, 1, 2, 3])
def test_what_is_gathered_while_a_block_runs(prefetch_units: int, transport: str) -> None:
    """Gathers that begin before the work of block i ends: those of the next `prefetch_units` blocks, no others."""
    case = Case(2, depth=6, transport=transport, policy=ShardPolicy(prefetch_units=prefetch_units))
    for trace, _, _ in run_ranks(2, trace_on_rank, case):
        names = [f"blocks.{index}" for index in range(6)]
        gathers = {name: spans_of(trace, "all-gather", name) for name in names}
        check_look_ahead(trace, "forward", names, {n: gathers[n][0] for n in names}, prefetch_units)
        # The last block is not gathered again for its backward.
        check_look_ahead(trace, "backward", names[4::-1], {n: gathers[n][1] for n in names[:5]}, prefetch_units)


def check_look_ahead(trace: Trace, kind: str, order: list[str], gathers: dict[str, Span], prefetch_units: int) -> None:
    for here, name in enumerate(order):
        (work,) = spans_of(trace, kind, name)
        begun = [n for n in order[here + 1 :] if gathers[n].start_s < work.stop_s]
        assert begun == order[here + 1 : here + 1 + prefetch_units]


def spans_of(trace: Trace, kind: str, name: str) -> list[Span]:
    """In order of time."""
    return sorted((s for s in trace.spans if (s.kind, s.name) == (kind, name)), key=lambda span: span.start_s)


def test_nothing_is_recorded_unless_asked() -> None:
    for trace, _, _ in run_ranks(2, trace_on_rank, Case(2), False):
        assert trace.spans == [] and trace.levels == []


def test_a_wait_ends_with_its_collective() -> None:
    """What compute waited for, it had: a wait of a unit lies at the end of a collective of that unit."""
    for trace, _, _ in run_ranks(2, trace_on_rank, Case(2, microbatches=2, transport="paired")):
        collectives = [span for span in trace.spans if span.lane != "compute"]
        waits = [span for span in trace.spans if span.kind == "wait"]
        assert len(waits) == len(collectives)
        for wait in waits:
            assert any(c.name == wait.name and c.start_s <= wait.start_s <= c.stop_s for c in collectives), wait
