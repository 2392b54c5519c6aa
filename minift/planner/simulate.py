"""One optimizer step of the engine, event by event, on clocks instead of tensors.

The engine (`fsdp/hooks.py`, `fsdp/unit.py`) decides on the host, unit by unit, when to gather, free, open gradients,
reduce and wait. `Engine` here takes the same decisions in methods of the same names, in the steady state (the order of
units has been learnt, nothing fails), and instead of computing moves three clocks of one rank forward:

    compute     forward, recompute, backward, update; stands still where the engine waits for a collective
    lanes       one to gather, one to reduce: copies and sums run there, beside compute (CUDA streams). On a CPU there
                are none, and this work moves the compute clock
    wires       one for each axis of the mesh: carries one collective after the other, in the order of issue. So do the
                two of the bus between a GPU and its host, one for each way

All ranks do the same at the same time, so one stands for all, and a collective lasts what `network` says of it. What
comes out is a `Trace`, with the spans of a recorded step in the same order; tests compare them.

Not here: what a unit costs (`costs`), what the engine holds (`memory`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from minift.fsdp.unit import REDUCTIONS_IN_FLIGHT, GradState, Keep, UnitState
from minift.planner.costs import Collective, Schedule, SimUnit
from minift.trace import Lane, Span, Trace


@dataclass(frozen=True)
class Simulated:
    """trace: of one rank. seconds: of the whole step. exposed_s: compute stood still, for collectives and the bus."""

    trace: Trace
    seconds: float
    exposed_s: float


def simulate(units: list[SimUnit], schedule: Schedule) -> Simulated:
    """Run one step of `units`, the root first, then the blocks in order."""
    engine = Engine(units, schedule)
    engine.step()
    if any(unit.pages_s for unit in units):  # those of the step before are on their way back when a step begins
        engine = Engine(units, schedule, page_stored_at=engine.page_stored_at - engine.now)
        engine.step()
    return Simulated(Trace(0, engine.spans), engine.now, engine.exposed_s)


@dataclass
class _Wire:
    """Carries one thing after the other."""

    free_at: float = 0.0

    def send(self, ready_at: float, seconds: float) -> float:
        """When that has arrived which was `ready_at` and takes so long."""
        self.free_at = max(self.free_at, ready_at) + seconds
        return self.free_at


@dataclass
class _Unit:
    """A unit's state, as in `fsdp/unit.py`."""

    costs: SimUnit
    state: UnitState = UnitState.SHARDED
    grad_state: GradState = GradState.CLOSED
    is_complete: bool = False
    gather_began: float = 0.0
    gathered_at: float = 0.0
    reduce_began: float | None = None
    reduced_at: float = 0.0
    input_is_sent_for: bool = False

    @property
    def name(self) -> str:
        return self.costs.name


@dataclass
class Engine:
    """`fsdp/hooks.py`, driven by a clock. Methods have the names of the engine's."""

    costs: list[SimUnit]
    schedule: Schedule
    now: float = 0.0
    exposed_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    page_stored_at: float = 0.0  # the last one; at the start, of the step before

    def __post_init__(self) -> None:
        self.units = [_Unit(costs) for costs in self.costs]
        self.root, *self.blocks = self.units
        self.shard_wire, self.replica_wire = _Wire(), _Wire()
        self.to_host, self.to_device = _Wire(self.page_stored_at), _Wire()  # pages of the step before may be on it
        self.input_copied_at = 0.0  # of the last one that was sent on its way
        self.page_loaded_at = 0.0
        self.gather_lane, self.reduce_lane = 0.0, 0.0
        self.reducing: deque[_Unit] = deque()
        self.replica_sums: deque[tuple[_Unit, float, float | None]] = deque()
        passing = [block for block in self.blocks if block.costs.keep is Keep.UNTIL_FORWARD_ENDS]
        self.free_gather_buffers = min(1 + self.schedule.prefetch_units, len(passing))
        reduced = [block for block in self.blocks if block.costs.reduce]
        self.free_reduce_buffers = min(REDUCTIONS_IN_FLIGHT, len(reduced))
        self.is_last_microbatch = False

    def step(self) -> None:
        self.now += self.schedule.start_s + self.schedule.meet_s  # the weight of the step
        for number in range(self.schedule.microbatches):
            self.is_last_microbatch = number == self.schedule.microbatches - 1
            self.forward()
            self.backward()
        if not self.schedule.steps_in_backward:
            self.now += sum(costs.norm_s for costs in self.costs)
        self.now += self.schedule.meet_s  # loss and norm
        if not self.schedule.steps_in_backward:
            began = self.now
            for unit in self.units:
                self._update(unit)
            self._span("compute", "optimizer", "", began)
        if self.schedule.meets_at_end:
            self.now += self.schedule.meet_s

    # Forward #

    def forward(self) -> None:
        order = self.units
        self._gather(self.root, order)
        began = self.now
        self.open_gradients(self.root)
        self.now += self.root.costs.forward_s
        for block in self.blocks:
            self._gather(block, order)
            if block.costs.input_s:
                self._copy_input(block, self.to_host)
            self._compute("forward", block.name, block.costs.forward_s)
            is_held = block is order[-1] or block.costs.keep is Keep.UNTIL_BACKWARD_ENDS
            if block.costs.keep is not Keep.UNTIL_UPDATE and not (is_held and block.costs.has_backward):
                self.free(block)
        self.now += self.root.costs.forward_head_s
        self._span("compute", "forward", "", began)

    # Backward #

    def backward(self) -> None:
        order = [self.root, *(block for block in reversed(self.blocks) if block.costs.has_backward)]
        self._gather(self.root, order)
        began = self.now
        self.now += self.root.costs.backward_head_s
        late: list[tuple[_Unit, float]] = []
        for block in order[1:]:
            self._pre_backward(block, order)
            block_began = self.now
            if block.costs.input_s:
                self._fetch_input(block)
            if block.costs.recompute_s:
                self._compute("recompute", block.name, block.costs.recompute_s)
            self.now += block.costs.backward_s
            if block.costs.ends_with_input:
                self._post_backward(block, block_began)
            else:
                late.append((block, block_began))
        self.now += self.root.costs.backward_s
        for unit, unit_began in [*late, (self.root, began)]:
            if unit.grad_state is GradState.OPEN or unit.costs.keep is not Keep.UNTIL_UPDATE:
                self._post_backward(unit, unit_began)
        self._end_of_backward()

    def _pre_backward(self, unit: _Unit, order: list[_Unit]) -> None:
        lacks_buffer = unit.costs.reduce and not self.schedule.keeps_full_grads and not self.free_reduce_buffers
        if lacks_buffer:
            self._finish_reductions(until=self.reducing[0])
        self._gather(unit, order)
        self.open_gradients(unit)

    def _post_backward(self, unit: _Unit, began: float) -> None:
        self._span("compute", "backward", unit.name, began)
        if unit.grad_state is GradState.OPEN:
            self.start_reduce(unit)
            self.reducing.append(unit)
            if self.schedule.shard_size == 1:
                self._finish_reductions(until=unit)
            elif self.schedule.keeps_full_grads and len(self.reducing) > REDUCTIONS_IN_FLIGHT:
                self._finish_reductions(until=self.reducing[0])
        if unit.costs.keep is not Keep.UNTIL_UPDATE:
            self.free(unit)

    def _end_of_backward(self) -> None:
        if self.reducing:
            self._finish_reductions(until=self.reducing[-1])
        while self.replica_sums:
            self._finish_replica_sum()

    def _finish_reductions(self, until: _Unit) -> None:
        unit = None
        while unit is not until:
            unit = self.reducing.popleft()
            began = self.now
            self.finish_reduce(unit)
            self._span("compute", "wait", unit.name, began)
            if self.is_last_microbatch:
                self._start_replica_sum(unit)

    def _start_replica_sum(self, unit: _Unit) -> None:
        sums = unit.costs.replica_sum
        arrives = None if sums is None else self.replica_wire.send(self.now, sums.wire_s) + sums.latency_s
        self.replica_sums.append((unit, self.now, arrives))
        if self.schedule.steps_in_backward:
            self._finish_replica_sum()

    def _finish_replica_sum(self) -> None:
        unit, issued, arrives = self.replica_sums.popleft()
        if arrives is not None:
            began = self.now
            self._wait_for(unit.costs.replica_sum, issued, arrives)
            self._span("compute", "wait", unit.name, began)
            self._span("reduce-scatter", "all-reduce", unit.name, issued)
        if self.schedule.steps_in_backward:
            began = self.now
            self.now += unit.costs.norm_s
            self._update(unit)
            self._span("compute", "optimizer", unit.name, began)

    # Update #

    def _update(self, unit: _Unit) -> None:
        """Pages come and go through two buffers, one shard after the other: `optim.memory.PinnedHost`. The host says
        when they come, which is far ahead. What is stored last is not waited for."""
        pages_s = unit.costs.pages_s
        if not any(pages_s):
            self.now += unit.costs.update_s
            return
        self.page_loaded_at = max(self.page_loaded_at, self.page_stored_at)
        stored_at = [self.page_stored_at, self.page_stored_at]  # what was in each buffer
        update_share = unit.costs.update_s / sum(pages_s)
        for number, page_s in enumerate(pages_s):
            self.page_loaded_at = self.to_device.send(max(self.page_loaded_at, stored_at[number % 2]), page_s)
            self._wait_until(self.page_loaded_at)
            self.now += update_share * page_s
            stored_at[number % 2] = self.page_stored_at = self.to_host.send(self.now, page_s)

    # Inputs in host memory: `recompute._Transfers` #

    def _copy_input(self, block: _Unit, way: _Wire) -> None:
        """One copy is under way at a time."""
        self._wait_until(self.input_copied_at)
        self.input_copied_at = way.send(self.now, block.costs.input_s)

    def _fetch_input(self, block: _Unit) -> None:
        """And send for the one that backward will want next."""
        self._send_for_input(block)
        block.input_is_sent_for = False
        self._wait_until(self.input_copied_at)
        sent_away = [other for other in self.blocks[: self.blocks.index(block)] if other.costs.input_s]
        if sent_away:
            self._send_for_input(sent_away[-1])

    def _send_for_input(self, block: _Unit) -> None:
        if not block.input_is_sent_for:
            block.input_is_sent_for = True
            self._copy_input(block, self.to_device)

    # Both #

    def _gather(self, unit: _Unit, order: list[_Unit]) -> None:
        here = order.index(unit) + 1
        if unit.state is UnitState.SHARDED:
            self.start_gather(unit)
        if unit.state is UnitState.GATHERING:
            self.wait_gather(unit)
        for later in order[here : here + self.schedule.prefetch_units]:
            if later.state is UnitState.SHARDED and (self.free_gather_buffers or not self._takes_turns(later)):
                self.start_gather(later)

    def _takes_turns(self, unit: _Unit) -> bool:
        """Whether it is gathered into one of the few buffers that blocks share."""
        return unit.costs.gather is not None and unit.costs.keep is Keep.UNTIL_FORWARD_ENDS

    # Units #

    def start_gather(self, unit: _Unit) -> None:
        unit.state = UnitState.GATHERING
        gather = unit.costs.gather
        if gather is None:
            return
        self.free_gather_buffers -= self._takes_turns(unit)
        unit.gather_began = self.now
        if self.schedule.has_lanes:
            ready = max(self.gather_lane, self.now)
            if gather.bus_s:
                ready = self.to_device.send(ready, gather.bus_s)
            arrives = self.shard_wire.send(ready + gather.prepare_s, gather.wire_s) + gather.latency_s
            unit.gathered_at = self.gather_lane = arrives
        else:
            self.now += gather.prepare_s
            unit.gathered_at = self.shard_wire.send(self.now, gather.wire_s) + gather.latency_s

    def wait_gather(self, unit: _Unit) -> None:
        if unit.costs.gather is not None:
            began = self.now
            self._wait_for(unit.costs.gather, unit.gather_began, unit.gathered_at)
            self._span("compute", "wait", unit.name, began)
            stop = unit.gathered_at if self.schedule.has_lanes else self.now
            self._span("all-gather", "all-gather", unit.name, unit.gather_began, stop)
        unit.state = UnitState.FULL

    def free(self, unit: _Unit) -> None:
        assert unit.state is UnitState.FULL
        self.free_gather_buffers += self._takes_turns(unit)
        unit.state = UnitState.SHARDED

    def open_gradients(self, unit: _Unit) -> None:
        if unit.costs.reduce is None or unit.grad_state is GradState.OPEN:
            return
        if unit is not self.root and not self.schedule.keeps_full_grads:
            self.free_reduce_buffers -= 1
        unit.grad_state = GradState.OPEN

    def start_reduce(self, unit: _Unit) -> None:
        unit.grad_state = GradState.REDUCING
        reduce = unit.costs.reduce
        alone = self.schedule.shard_size == 1
        is_sent = not self.schedule.keeps_full_grads or (self.is_last_microbatch and not alone)
        unit.reduce_began = self.now if is_sent else None
        unit.reduced_at = self.now
        if is_sent and self.schedule.has_lanes:
            ready = max(self.reduce_lane, self.now) + reduce.prepare_s
            arrives = self.shard_wire.send(ready, reduce.wire_s) + reduce.latency_s
            unit.reduced_at = self.reduce_lane = arrives + reduce.finish_s
        elif is_sent:
            self.now += reduce.prepare_s
            unit.reduced_at = self.shard_wire.send(self.now, reduce.wire_s) + reduce.latency_s

    def finish_reduce(self, unit: _Unit) -> None:
        if unit.reduce_began is not None:
            self._wait_for(unit.costs.reduce, unit.reduce_began, unit.reduced_at)
            if not self.schedule.has_lanes:
                self.now += unit.costs.reduce.finish_s
            stop = unit.reduced_at if self.schedule.has_lanes else self.now
            self._span("reduce-scatter", "reduce-scatter", unit.name, unit.reduce_began, stop)
        if unit is not self.root and not self.schedule.keeps_full_grads:
            self.free_reduce_buffers += 1
        unit.grad_state = GradState.CLOSED

    # Clock #

    def _compute(self, kind: str, name: str, seconds: float) -> None:
        began = self.now
        self.now += seconds
        self._span("compute", kind, name, began)

    def _wait_for(self, collective: Collective, issued: float, arrives: float) -> None:
        """And make up for the time in which compute was slower than it seemed, since `issued`."""
        if collective.host_s and arrives > issued:
            self.now += collective.host_s * min(1.0, (self.now - issued) / (arrives - issued))
        self._wait_until(arrives)

    def _wait_until(self, moment: float) -> None:
        self.exposed_s += max(0.0, moment - self.now)
        self.now = max(self.now, moment)

    def _span(self, lane: Lane, kind: str, name: str, start: float, stop: float | None = None) -> None:
        self.spans.append(Span(lane, kind, name, start, self.now if stop is None else stop))
