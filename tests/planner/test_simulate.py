"""The simulated step: the order of its events, and its time where that can be told without simulating.

Oracles: what a recorder writes down in real steps of the engine on 1 to 3 gloo processes; sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.fsdp.unit import Keep, Unit
from minift.optim.shard import FlatShard
from minift.planner.costs import Collective, Schedule, SimUnit
from minift.planner.simulate import simulate
from minift.recompute import RecomputeConfig
from minift.trace import Recorder, Trace
from tests.fsdp.trees import BF16, FP32, FROZEN, Case, policies, run_microbatches, sharded
from tests.ranks import run_ranks

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
Event = tuple[str, str, str]


# The order of events #


def events_of(trace: Trace) -> list[Event]:
    """(lane, kind, unit) in the order in which they were written down. Of a block that makes several results again
    one after the other, one recomputation."""
    return [event for event, _ in groupby((span.lane, span.kind, span.name) for span in trace.spans)]


def recorded(world: World, case: Case) -> tuple[list[Event], list[SimUnit], Schedule]:
    """The events of the third step, and what a simulation of it is to be told."""
    recorder = Recorder(world.rank, world.device)
    model, engine = sharded(case, world, recorder=recorder)

    def update(shard: FlatShard) -> None:
        with recorder.during("compute", "optimizer", shard.name.partition(":")[0].removeprefix("(root)")):
            pass

    if case.policy.step_in_backward:
        engine.update_in_backward(update)
    for _ in range(3):
        recorder.start()
        run_microbatches(model, engine, case, world.rank)
        if not case.policy.step_in_backward:
            with recorder.during("compute", "optimizer", ""):
                pass
        trace = recorder.stop()
        engine.weights_changed()
        engine.clear_gradients()
    needs_grad = model.embed.weight.requires_grad
    units = []
    for unit in engine.units:
        units.append(sim_unit(unit, engine.replica_world.size, needs_input_grad=needs_grad, case=case))
        needs_grad = needs_grad or (unit is not engine.units[0] and bool(unit.trainable))
    schedule = Schedule(
        microbatches=case.microbatches,
        prefetch_units=case.policy.prefetch_units,
        shard_size=engine.shard_world.size,
        keeps_full_grads=case.policy.keeps_full_gradients(engine.shard_world.size),
        steps_in_backward=case.policy.step_in_backward,
    )
    return events_of(trace), units, schedule


def sim_unit(unit: Unit, replicas: int, needs_input_grad: bool, case: Case) -> SimUnit:
    is_block = unit.name != ""
    is_recomputed = is_block and int(unit.name.rpartition(".")[2]) % case.recompute.every == 0
    makes_again = {"none": False, "selective": True}.get(case.recompute.policy, True)
    return SimUnit(
        unit.name,
        unit.keep,
        recompute_s=float(is_recomputed and makes_again),
        gather=None if all(bucket.resident for bucket in unit.buckets) else Collective(),
        reduce=Collective() if unit.trainable else None,
        replica_sum=Collective() if replicas > 1 and unit.trainable else None,
        has_backward=not is_block or needs_input_grad or bool(unit.trainable),
        ends_with_input=is_block and needs_input_grad,
    )


@st.composite
def cases(draw) -> Case:
    world_size = draw(st.integers(1, 3))
    return Case(
        world_size,
        depth=draw(st.integers(1, 5)),
        tied=draw(st.booleans()),
        frozen=draw(st.sampled_from([*FROZEN, "embed|norm"])),
        microbatches=draw(st.integers(1, 3)),
        transport=draw(st.sampled_from(["shared", "paired"])),
        policy=draw(policies(world_size, replicas=True)),
        precision=draw(st.sampled_from([FP32, BF16])),
        recompute=draw(
            st.builds(RecomputeConfig, policy=st.sampled_from(["none", "full", "offload"]), every=st.integers(1, 3))
        ),
    )


@settings(max_examples=30, deadline=None, phases=PHASES)
@example(Case(2, frozen="embed|norm", policy=ShardPolicy("zero2")))
@given(cases())
def test_events_come_in_the_order_of_a_real_step(case: Case) -> None:
    for expected, units, schedule in run_ranks(case.world_size, recorded, case):
        assert events_of(simulate(units, schedule).trace) == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_events_of_selective_recomputation(world_size: int) -> None:
    case = Case(world_size, depth=3, precision=BF16, recompute=RecomputeConfig("selective"))
    for expected, units, schedule in run_ranks(world_size, recorded, case):
        assert events_of(simulate(units, schedule).trace) == expected


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_events_of_a_step_that_updates_in_backward(strategy: str, replicas: int) -> None:
    policy = ShardPolicy(strategy=strategy, replicas=replicas, step_in_backward=True)
    case = Case(2, depth=4, precision=BF16, policy=policy)
    for expected, units, schedule in run_ranks(2, recorded, case):
        assert ("compute", "optimizer", "blocks.1") in expected
        assert events_of(simulate(units, schedule).trace) == expected


# Time #

seconds = st.floats(0.0, 8.0).map(lambda value: round(value * 64) / 64)  # sums of these are exact


@st.composite
def steps(draw) -> tuple[list[SimUnit], Schedule]:
    """Any costs, in any schedule."""
    keep = draw(st.sampled_from([Keep.UNTIL_FORWARD_ENDS, Keep.UNTIL_FORWARD_ENDS, Keep.UNTIL_UPDATE]))
    keeps_full_grads = keep is Keep.UNTIL_UPDATE and draw(st.booleans())
    shard_size = draw(st.sampled_from([1, 2, 4096]))
    replicated = draw(st.booleans())
    trains = draw(st.booleans())

    def collective() -> Collective:
        return Collective(draw(seconds), draw(seconds), draw(seconds), draw(seconds))

    def unit(name: str, keep: Keep) -> SimUnit:
        return SimUnit(
            name,
            keep,
            forward_s=draw(seconds),
            backward_s=draw(seconds),
            recompute_s=draw(seconds) if name else 0.0,
            forward_head_s=0.0 if name else draw(seconds),
            backward_head_s=0.0 if name else draw(seconds),
            norm_s=draw(seconds),
            update_s=draw(seconds),
            gather=draw(st.none() | st.builds(collective)) if shard_size > 1 else None,
            reduce=collective() if trains else None,
            replica_sum=collective() if trains and replicated else None,
            ends_with_input=name not in ("", "blocks.0"),
        )

    depth = draw(st.integers(0, 6))
    root = unit("", Keep.UNTIL_UPDATE if keep is Keep.UNTIL_UPDATE else Keep.UNTIL_BACKWARD_ENDS)
    blocks = []
    for index in range(depth):
        stays = keep is Keep.UNTIL_FORWARD_ENDS and draw(st.booleans())
        blocks.append(unit(f"blocks.{index}", Keep.UNTIL_BACKWARD_ENDS if stays else keep))
    schedule = Schedule(
        draw(st.integers(1, 4)),
        draw(st.integers(0, 3)),
        shard_size,
        keeps_full_grads or shard_size == 1,
        has_lanes=draw(st.booleans()),
        meet_s=draw(seconds),
    )
    return [root, *blocks], schedule


def compute_s(units: list[SimUnit], schedule: Schedule) -> float:
    per_microbatch = sum(
        u.forward_s + u.recompute_s + u.backward_s + u.forward_head_s + u.backward_head_s for u in units
    )
    once = sum(u.norm_s + u.update_s for u in units)
    return schedule.microbatches * per_microbatch + once + 2 * schedule.meet_s


def with_collectives(units: list[SimUnit], change) -> list[SimUnit]:
    """Every collective c replaced by change(c)."""
    names = ("gather", "reduce", "replica_sum")
    changed = [{name: change(getattr(u, name)) for name in names if getattr(u, name) is not None} for u in units]
    return [replace(u, **collectives) for u, collectives in zip(units, changed, strict=True)]


@settings(max_examples=200, deadline=None)
@given(steps())
def test_with_free_communication_a_step_is_its_computation(step) -> None:
    units, schedule = step
    simulated = simulate(with_collectives(units, lambda c: Collective()), schedule)
    assert (simulated.seconds, simulated.exposed_s) == (compute_s(units, schedule), 0.0)


@settings(max_examples=200, deadline=None)
@given(steps(), st.booleans())
def test_with_free_computation_a_step_is_its_communication(step, has_lanes: bool) -> None:
    """One wire, and nothing beside what it carries: collectives come one after the other, without a pause."""
    units, schedule = step
    units = with_collectives(units, lambda c: Collective(wire_s=c.wire_s))
    units = [replace(SimUnit(u.name, u.keep), gather=u.gather, reduce=u.reduce) for u in units]
    schedule = replace(schedule, meet_s=0.0, has_lanes=has_lanes)
    simulated = simulate(units, schedule)
    begun = sum(span.kind == "all-gather" for span in simulated.trace.spans)
    sums = [span.name for span in simulated.trace.spans if span.kind == "reduce-scatter"]
    by_name = {unit.name: unit for unit in units}
    gathers = [span.name for span in simulated.trace.spans if span.kind == "all-gather"]
    wire_s = sum(by_name[name].gather.wire_s for name in gathers) + sum(by_name[name].reduce.wire_s for name in sums)
    assert len(gathers) == begun and simulated.seconds == simulated.exposed_s == wire_s


@settings(max_examples=200, deadline=None)
@given(steps(), st.sampled_from([1, 2, 4]))
def test_a_slower_link_never_makes_a_step_faster(step, slower: int) -> None:
    units, schedule = step
    slow = with_collectives(units, lambda c: replace(c, wire_s=slower * c.wire_s, latency_s=slower * c.latency_s))
    fast_s, slow_s = simulate(units, schedule).seconds, simulate(slow, schedule).seconds
    assert fast_s <= slow_s <= slower * fast_s


@settings(max_examples=200, deadline=None)
@given(steps())
def test_a_step_takes_at_least_its_computation_and_its_communication(step) -> None:
    """And at most both, one after the other."""
    units, schedule = step
    simulated = simulate(units, schedule)
    free = simulate(with_collectives(units, lambda c: replace(c, wire_s=0.0, latency_s=0.0)), schedule)
    assert max(compute_s(units, schedule), free.seconds) <= simulated.seconds
    assert all(span.start_s <= span.stop_s <= simulated.seconds for span in simulated.trace.spans)
    waits = sum(span.stop_s - span.start_s for span in simulated.trace.spans if span.kind == "wait")
    assert simulated.exposed_s <= waits + 1e-9


def over_a_bus(step: tuple[list[SimUnit], Schedule], draw: Callable[[], float], slower: int = 1) -> list[SimUnit]:
    """The units of `step` with a part of everything in host memory, so many times as slow to reach."""
    units = []
    for unit in step[0]:
        gather = unit.gather and replace(unit.gather, bus_s=slower * draw())
        is_block = unit.name != ""
        pages_s = tuple(slower * draw() for _ in range(int(draw())))
        units.append(replace(unit, gather=gather, input_s=slower * draw() * is_block, pages_s=pages_s))
    return units


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
def test_a_slower_bus_never_makes_a_step_faster(step, seed: int, slower: int) -> None:
    schedule = replace(step[1], has_lanes=True)

    def step_s(slower: int) -> float:
        numbers = random.Random(seed)
        return simulate(over_a_bus(step, lambda: numbers.randrange(4 * 64) / 64, slower), schedule).seconds

    free_s, fast_s, slow_s = step_s(0), step_s(1), step_s(slower)
    assert max(compute_s(*step), free_s) <= fast_s <= slow_s <= slower * fast_s


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(0, 2**31), st.sampled_from(["gathers", "inputs", "pages"]))
def test_with_free_computation_a_step_is_what_crosses_the_bus(step, seed: int, what: str) -> None:
    """Gathers come one after the other; inputs too, there and back again. While a page comes another goes, and each way
    the pages of a unit take their time; a unit begins when the last one's are back."""
    numbers = random.Random(seed)
    units = over_a_bus(step, lambda: numbers.randrange(1, 4 * 64) / 64)
    schedule = replace(step[1], has_lanes=True, meet_s=0.0)
    only = [SimUnit(u.name, u.keep, ends_with_input=u.ends_with_input) for u in units]
    if what == "gathers":
        gathers = [u.gather and Collective(bus_s=u.gather.bus_s) for u in units]
        units = [replace(o, gather=gather) for o, gather in zip(only, gathers, strict=True)]
        simulated = simulate(units, schedule)
        names = [span.name for span in simulated.trace.spans if span.kind == "all-gather"]
        assert simulated.seconds == sum(unit.gather.bus_s * names.count(unit.name) for unit in units if unit.gather)
    elif what == "inputs":
        units = [replace(o, input_s=u.input_s) for o, u in zip(only, units, strict=True)]
        assert simulate(units, schedule).seconds == 2 * schedule.microbatches * sum(unit.input_s for unit in units)
    else:
        units = [replace(o, pages_s=u.pages_s, update_s=1e-9) for o, u in zip(only, units, strict=True)]
        there_s = sum(sum(unit.pages_s) for unit in units)
        ends_s = sum(unit.pages_s[-1] for unit in units if unit.pages_s)
        simulated_s = simulate(units, schedule).seconds
        assert there_s <= simulated_s * (1 + 1e-6) and simulated_s <= 2 * there_s + ends_s + 1e-6


def test_prefetching_hides_what_fits_beneath_computation() -> None:
    """Three blocks of 4 s, gathers of 3 s: the root's and the first block's come before anything can run."""
    gather = Collective(wire_s=3.0)
    root = SimUnit("", Keep.UNTIL_BACKWARD_ENDS, gather=gather, ends_with_input=False)
    blocks = [
        SimUnit(f"blocks.{index}", Keep.UNTIL_FORWARD_ENDS, forward_s=4.0, backward_s=4.0, gather=gather)
        for index in range(3)
    ]
    without, with_one = (
        simulate([root, *blocks], Schedule(1, units, shard_size=2, keeps_full_grads=False)) for units in (0, 1)
    )
    assert (without.exposed_s, without.seconds) == (3.0 * (1 + 3 + 2), 24.0 + 18.0)
    assert (with_one.exposed_s, with_one.seconds) == (3.0 * 2, 24.0 + 6.0)


def test_thousands_of_ranks_take_no_longer_than_two() -> None:
    """A schedule knows the number of ranks only as a cost of collectives: the trace is one rank's."""
    unit = SimUnit("", Keep.UNTIL_BACKWARD_ENDS, 1.0, gather=Collective(wire_s=2.0))
    two, many = (simulate([unit], Schedule(1, 1, size, keeps_full_grads=False)) for size in (2, 4096))
    assert two == many
