"""Every run checks its plan: one step of it is measured, and set against what `memory` and `timing` say of that step.

    check = PlanCheck(config, built, optimizer)
    with check.step(2, microbatches):
        train_step(...)
    check.result()                       -> report.PlanResult

What is held between steps is read off the tensors of the engine and the optimizer, by category, to the byte. The peak
is counted by `TensorMeter` on a CPU, and is what PyTorch's allocator says on a GPU. All of this rank, in a step that
comes after the first, in which the engine learns the order of the blocks. Steps after that one are timed, and set
against what this machine was calibrated to, if it was; those of a single GPU, against its datasheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Protocol

import torch

from minift.build import BuiltModel, ModelSource
from minift.data.batch import Batch
from minift.fsdp import ShardedModel
from minift.fsdp.bucket import Bucket
from minift.optim.adamw import AdamW
from minift.planner.calibration import find_calibration
from minift.planner.catalog import gpu, network, this_gpu
from minift.planner.describe import describe
from minift.planner.device import Device, Rate
from minift.planner.memory import PERSISTENT, MemoryPlan, plan_memory
from minift.planner.meter import TensorMeter
from minift.planner.network import Network
from minift.planner.network import Protocol as NetworkProtocol
from minift.planner.shapes import Link, RunShape, Setup, Workload
from minift.planner.timing import time_step
from minift.quant.weights import QuantWeights
from minift.report import PlanResult

# What is sent depends on the order of events alone: count it where time costs nothing.
FREE_DEVICE = Device("free", math.inf, math.inf, math.inf, {"*": Rate()})
FREE_NETWORK = Network(math.inf, math.inf, 1, (NetworkProtocol(),))


TIMED_STEPS = 20


class Config(Setup, Protocol):
    """What is read of a run's configuration."""

    model: ModelSource


class PlanCheck:
    """Of one process."""

    def __init__(self, config: Config, built: BuiltModel, optimizer: AdamW) -> None:
        self._config, self._built, self._optimizer = config, built, optimizer
        self._workloads: list[Workload] = []
        self._step = self._peak_bytes = self._sent_bytes = 0
        self._timed: list[tuple[Workload, float]] = []

    @contextmanager
    def step(self, number: int, microbatches: Sequence[Batch]) -> Iterator[None]:
        """Around one optimizer step, the `number`th of the run."""
        engine, device = self._built.engine, self._built.engine.world.device
        self._step = number
        self._workloads = [_workload(batch, len(microbatches)) for batch in microbatches]
        sent_bytes = engine.sent_bytes()
        with ExitStack() as stack:
            meter = None
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                meter = stack.enter_context(TensorMeter())
            yield
        self._sent_bytes = engine.sent_bytes() - sent_bytes
        held = sum(held_bytes(engine, self._optimizer).values())
        batches = sum(t.nbytes for b in microbatches for t in (b.tokens_T, b.positions_T, b.targets_T))
        self._peak_bytes = held + batches + meter.peak_bytes if meter else torch.cuda.max_memory_allocated(device)

    @contextmanager
    def timed(self, microbatches: Sequence[Batch]) -> Iterator[None]:
        """Around a later step, in which nothing else is measured. The first few count."""
        started = time.perf_counter()
        yield
        if len(self._timed) < TIMED_STEPS:
            self._timed.append((_mean([_timed(batch) for batch in microbatches]), time.perf_counter() - started))

    def result(self) -> PlanResult | None:
        """None if no step was measured."""
        if not self._workloads:
            return None
        built, engine = self._built, self._built.engine
        run = describe(
            built.config,
            self._config,
            world_size=engine.world.size,
            link=link_of(engine),
            workload=self._workloads[0],
            weights=QuantWeights(self._config.model.path),
        )
        plans = [plan_memory(replace(run, workload=workload)) for workload in self._workloads]
        highest = max(plans, key=lambda plan: plan.peak_bytes)
        measured = held_bytes(engine, self._optimizer)
        timed = time_step(replace(run, workload=_mean(self._workloads)), FREE_DEVICE, FREE_NETWORK)
        return PlanResult(
            step=self._step,
            held={name: (_everywhere(highest, name), measured[name]) for name in PERSISTENT},
            peak=(highest.peak_bytes + (0 if run.is_on_gpu else highest.host_bytes), self._peak_bytes),
            peak_at=highest.peak.name,
            sent=(timed.sent_bytes, self._sent_bytes),
            seconds=self._seconds(run),
        )

    def _seconds(self, run: RunShape) -> tuple[float, float] | None:
        """Of a step, planned and measured, means over those that were timed; None without figures of this machine."""
        figures = _gpu_figures(run) if run.is_on_gpu else _cpu_figures(run)
        if figures is None or not self._timed:
            return None
        planned = [time_step(replace(run, workload=workload), *figures).seconds for workload, _ in self._timed]
        return fmean(planned), fmean(seconds for _, seconds in self._timed)


def _cpu_figures(run: RunShape) -> tuple[Device, Network] | None:
    calibration = find_calibration("cpu")
    return calibration and (calibration.device(run.world_size), calibration.network(run.world_size))


def _gpu_figures(run: RunShape) -> tuple[Device, Network] | None:
    """Of a datasheet; of several ranks nobody says how they are connected."""
    name = this_gpu()
    if name is None or run.world_size > 1 or run.host_updates:
        return None
    return gpu(name), network("nvlink")


def link_of(engine: ShardedModel) -> Link:
    """How the ranks of `engine` exchange tensors."""
    if engine.world.backend == "nccl":
        return "nccl"
    return "shared memory" if engine.shares_memory or engine.shard_world.size == 1 else "paired sends"


def held_bytes(engine: ShardedModel, optimizer: AdamW) -> dict[str, int]:
    """What this rank holds between steps, by category, off the tensors themselves; of what ranks share, its part."""
    num_owners = engine.shard_world.size if engine.shares_memory else 1
    held = dict.fromkeys(PERSISTENT, 0)
    for bucket in engine.buckets:
        is_whole = bucket.resident and not engine.shares_memory
        scales = _scale_bytes(bucket, is_whole)
        held["quantization scales"] += scales
        held["weights"] += bucket.shard.nbytes * (bucket.world.size if is_whole else 1) - scales
        held["weights"] += 0 if bucket.lower is None else bucket.lower.nbytes
    rings = {id(ring): ring for unit in engine.units for ring in (unit.gather_ring, unit.reduce_ring)}
    gather_rings = {id(unit.gather_ring) for unit in engine.units}
    for key, ring in rings.items():
        num_bytes = sum(buffer.num_bytes for buffer in ring.buffers)
        if key in gather_rings:
            held["gathered buffers"] += num_bytes // num_owners
        else:
            held["reduce buffers"] += num_bytes
    held["gradients"] = _gradient_bytes(engine)
    held["optimizer state"] = optimizer.state_bytes()
    return held


def _scale_bytes(bucket: Bucket, is_whole: bool) -> int:
    """What is no code of the NF4 weights in the shard of this rank, or in the whole bucket."""
    if bucket.dtypes.wire != torch.uint8:
        return 0
    if is_whole:
        sizes = {span.name: span.shape.numel() for span in bucket.layout.spans}
    else:
        sizes = {r.name: r.stop - r.start for r in bucket.layout.local_ranges(bucket.world.rank)}
    return sum(size for name, size in sizes.items() if not name.endswith("codes"))


def _gradient_bytes(engine: ShardedModel) -> int:
    """Buffers that gradients are kept in; else the shards, of which blocks may have the same (step_in_backward)."""
    trainable = [bucket for bucket in engine.buckets if bucket.trainable]
    kept = sum(bucket.kept_buffer.num_bytes for bucket in trainable if bucket.kept_buffer is not None)
    storages = [b.grad.untyped_storage() for b in trainable if b.kept_buffer is None and b.grad is not None]
    return kept + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _workload(batch: Batch, microbatches: int) -> Workload:
    """Documents of the length of the longest."""
    return Workload(
        tokens=batch.num_tokens,
        document_tokens=batch.max_seqlen,
        microbatches=microbatches,
        targets=batch.num_targets,
    )


def _timed(batch: Batch) -> Workload:
    """Documents of the length with which attention sees as many pairs."""
    lengths = batch.cu_seqlens.diff().double()
    same_pairs = max(1, round(float(lengths.square().sum() / lengths.sum())))
    return replace(_workload(batch, 1), document_tokens=same_pairs)


def _mean(workloads: Sequence[Workload]) -> Workload:
    """One that is, so many times, about the same work."""
    count = len(workloads)
    tokens = max(1, sum(w.tokens for w in workloads) // count)
    return Workload(
        tokens=tokens,
        document_tokens=min(tokens, sum(w.document_tokens for w in workloads) // count),
        microbatches=count,
        targets=min(tokens, sum(w.num_targets for w in workloads) // count),
    )


def _everywhere(plan: MemoryPlan, category: str) -> int:
    return plan.persistent[category] + plan.host.get(category, 0)
