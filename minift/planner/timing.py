"""How long a step of a run takes on a device and a network: the work priced, the schedule simulated.

    timed = time_step(run, device, network)      run: `shapes.RunShape`
    timed.seconds, timed.exposed_s, timed.trace

On CUDA copies, casts and sums run in lanes of their own beside compute. On a CPU they take their turn in it, and so
does what ranks do to meet.

What crosses the bus to host memory takes turns on it, each way: frozen weights before they are gathered, inputs of
blocks, moments in pages. Not here: masters in host memory, which the host's processor updates (`fsdp.offload`);
collectives of GPUs without NVLink, which cross the same bus.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from minift.planner.costs import Collective, Schedule, SimUnit
from minift.planner.device import Device
from minift.planner.exchange import Transfer
from minift.planner.network import Network
from minift.planner.shapes import RunShape, UnitShape
from minift.planner.simulate import Simulated, simulate
from minift.planner.work import StepWork, UnitWork, count


@dataclass(frozen=True)
class Timed:
    """A step of one rank. simulated: event by event."""

    run: RunShape
    work: StepWork
    simulated: Simulated

    @property
    def seconds(self) -> float:
        return self.simulated.seconds

    @property
    def exposed_s(self) -> float:
        """In which nothing is computed."""
        return self.simulated.exposed_s

    @property
    def sent_bytes(self) -> int:
        """That this rank sends in the step: what `ShardedModel.sent_bytes` counts."""
        return sent_bytes(self.run, self.work, self.simulated)


def time_step(run: RunShape, device: Device, network: Network) -> Timed:
    work = count(run)
    units = [_priced(run, unit, shape, device, network) for unit, shape in zip(work.units, run.units, strict=True)]
    has_live_weights = run.shares_memory and any(b.trainable and b.resident for b in run.buckets)
    everybody = network.shard_axis(run.world_size)
    schedule = Schedule(
        microbatches=work.microbatches,
        prefetch_units=run.policy.prefetch_units,
        shard_size=run.shard_size,
        keeps_full_grads=any(bucket.keeps_full_grads for bucket in run.buckets),
        steps_in_backward=run.policy.step_in_backward,
        has_lanes=run.is_on_gpu,
        start_s=device.step_s,
        meet_s=network.meet_seconds(everybody),
        meets_at_end=has_live_weights,
    )
    return Timed(run, work, simulate(units, schedule))


def _priced(run: RunShape, work: UnitWork, shape: UnitShape, device: Device, network: Network) -> SimUnit:
    shard, replicas = network.shard_axis(run.shard_size), network.replica_axis(run.world_size, run.shard_size)
    exchange = work.exchange

    def exchanged(transfer: Transfer | None) -> Collective | None:
        if transfer is None:
            return None
        prepare_s, finish_s = device.seconds(transfer.prepare), device.seconds(transfer.finish)
        if run.shares_memory:
            return Collective(prepare_s, finish_s=finish_s)
        moved = transfer.full_bytes * (shard.size - 1) / shard.size
        wire_s = network.shard_seconds(transfer.full_bytes, shard)
        bus_s = transfer.from_host_bytes / device.bus_bytes_per_s
        host_s = moved * network.host_s_per_byte
        return Collective(prepare_s, wire_s, finish_s=finish_s, host_s=host_s, bus_s=bus_s)

    replica_sum = None
    if exchange.replica_bytes:
        moved = 2 * exchange.replica_bytes * (replicas.size - 1) / replicas.size / network.sum_share
        wire_s = network.sum_seconds(exchange.replica_bytes, replicas)
        replica_sum = Collective(wire_s=wire_s, host_s=moved * network.host_s_per_byte)
    return SimUnit(
        work.name,
        shape.keep,
        forward_s=device.seconds(work.forward, passes=1),
        recompute_s=device.seconds(work.recompute),
        backward_s=device.seconds(work.backward, passes=work.has_backward),
        forward_head_s=device.seconds(work.forward_head),
        backward_head_s=device.seconds(work.backward_head),
        gather=exchanged(exchange.gather),
        reduce=exchanged(exchange.reduce),
        replica_sum=replica_sum,
        norm_s=device.seconds(exchange.square_sum),
        update_s=device.seconds(update.op for update in exchange.updates),
        pages_s=tuple(page / device.bus_bytes_per_s for update in exchange.updates for page in update.pages_bytes),
        input_s=work.input_bytes / device.bus_bytes_per_s,
        has_backward=work.has_backward,
        ends_with_input=work.ends_with_input,
    )


def sent_bytes(run: RunShape, work: StepWork, simulated: Simulated) -> int:
    """(N - 1)/N of what is gathered or reduced from, each time; an all-reduce sends twice that, of R replicas. Nothing
    is sent between ranks that share memory."""
    by_name = {unit.name: unit for unit in work.units}
    sent = 0
    for (kind, name), times in Counter((span.kind, span.name) for span in simulated.trace.spans).items():
        unit = by_name.get(name)
        if kind == "all-reduce":
            replicas = run.world_size // run.shard_size
            sent += times * (2 * unit.exchange.replica_bytes * (replicas - 1) // replicas)
        elif kind in ("all-gather", "reduce-scatter") and not run.shares_memory:
            transfer = unit.exchange.gather if kind == "all-gather" else unit.exchange.reduce
            sent += times * (transfer.full_bytes // run.shard_size * (run.shard_size - 1))
    return sent
