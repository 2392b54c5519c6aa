"""Measure this machine, so that plans for it can be made: `minift plan --calibrate`.

    calibration = calibrate("cpu", num_processes=(1, 2))           under a minute

Measured with as many processes as will run, at work at the same time, because they share a memory and perhaps a core:
every kind of operation in a few sizes (`samples`), from which a line and what is off it is made (`device.Rate`); what a
step costs beside its operations, in models so small that it is most of it; what it takes to meet, and to send, by the
engine's own transports. Not here: what the figures are good for (`calibration`, `timing`).
"""

from __future__ import annotations

import datetime
import itertools
import math
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minift.dist.collectives import barrier, gather_objects
from minift.dist.process import World
from minift.fsdp.transport import Buffer, PairedSends
from minift.model.config import ModelConfig
from minift.peft.lora import LoraConfig
from minift.planner.calibration import Calibration, describe_machine
from minift.planner.describe import describe
from minift.planner.device import Deviation, Device, Rate
from minift.planner.network import Network, Protocol
from minift.planner.op import Op
from minift.planner.samples import samples
from minift.planner.shapes import Workload
from minift.planner.trial import Trial, TrialSetup
from minift.planner.work import StepWork, count
from minift.quant.linear import QuantConfig

ROUNDS = 2
_GROUP_S = 0.002  # a call is repeated for so long, in three groups
_TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
_TINY_WORK = Workload(tokens=32, document_tokens=32)
_MESSAGE_BYTES = (1 << 14, 1 << 18, 1 << 22)
_CALLS = 5  # of a message


_TINY_SETUPS = (TrialSetup(), TrialSetup(LoraConfig(r=8)), TrialSetup(LoraConfig(r=8), QuantConfig()))
_TINY_LAYERS = (1, 6)


class Calibrator:
    """Measures in rounds, so that other measurements can be made in between. One rank's part; all of `world`, the ranks
    that are at work at the same time, call alike.

    Where there are more ranks than processors, operations are measured on as many as there are processors, and take
    that much longer on all: what one takes by the clock then depends on whose turn it is.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._samples = list(samples(world.device))
        self._at_work = world.size
        if world.device.type == "cpu":
            self._at_work = min(world.size, max(1, (os.cpu_count() or 1) // torch.get_num_threads()))
        self._seconds: dict[tuple[int, Op], list[float]] = defaultdict(list)
        self._steps: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._links = LinkCalibrator(world)

    def round(self) -> None:
        """Everything once."""
        for number, make in enumerate(self._samples):
            sample = make()
            sample.run()
            barrier(self.world)
            if self.world.rank < self._at_work:  # others wait, and take nothing
                self._seconds[number, sample.op].append(self._median(sample.run))
        for key in itertools.product(range(len(_TINY_SETUPS)), _TINY_LAYERS):
            setup, layers = key
            config = ModelConfig.from_hf(_TINY | {"num_hidden_layers": layers})
            trial = Trial(config, _TINY_SETUPS[setup], _TINY_WORK, self.world)
            trial.step()
            barrier(self.world)
            self._steps[key].append(median(self._elapsed(trial.step, 1) for _ in range(10)))
        self._links.round()

    def _median(self, run: Callable[[], object]) -> float:
        """Seconds of a call: the median of three groups of them."""
        once = self._elapsed(run, 1)
        calls = max(1, min(100, int(_GROUP_S / once)))
        return median(self._elapsed(run, calls) for _ in range(3))

    def _elapsed(self, run: Callable[[], object], calls: int) -> float:
        return _elapsed(run, calls, self.world.device)

    def figures(self) -> tuple[Device, Network]:
        """What the rounds say; the same on all ranks."""
        ops, steps = _over_ranks([self._seconds, self._steps], self.world)
        network = self._links.network()
        device = Device(
            name=self.world.device.type,
            memory_bytes=_memory_bytes(self.world),
            peak_flops_per_s=max(op.flops / seconds for (_, op), seconds in ops.items()),
            memory_bytes_per_s=max(op.bytes / s for (_, op), s in ops.items() if op.kind == "copy"),
            rates=fit_rates([(op, seconds) for (_, op), seconds in ops.items()]),
            runs_ahead=self.world.device.type == "cuda",
        ).slower(self.world.size / self._at_work)
        return _with_host(device, steps, self.world, network.meet_s), network


class LinkCalibrator:
    """What it takes the ranks of `world` to meet and, on CPUs, to send each other something by the engine's paired
    sends. In rounds, likewise."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._meetings: dict[str, list[float]] = defaultdict(list)
        self._elapsed: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._busy: dict[tuple[str, int], list[float]] = defaultdict(list)

    def round(self) -> None:
        """Messages of every size, by all-gathers and by all-reduces."""
        device, group = self.world.device, self.world.group
        self._meetings["meet"].append(_elapsed(lambda: barrier(self.world), 20, device))
        if self.world.size == 1 or device.type != "cpu":
            return
        link = PairedSends(self.world)
        for num_bytes in _MESSAGE_BYTES:
            (buffer,) = link.gather_buffers(1, num_bytes)
            full, addends = buffer.memory, torch.zeros(num_bytes // 4)
            for kind, run in (
                ("gather", partial(_gather, link, buffer, full)),
                ("sum", partial(dist.all_reduce, addends, group=group)),
            ):
                run()
                barrier(self.world)
                busy = time.process_time()
                self._elapsed[kind, num_bytes].append(_elapsed(run, _CALLS, device))
                self._busy[kind, num_bytes].append((time.process_time() - busy) / _CALLS)

    def network(self) -> Network:
        """What the rounds say; the same on all ranks."""
        meetings, elapsed, busy = _over_ranks([self._meetings, self._elapsed, self._busy], self.world)
        size, meet_s = self.world.size, meetings["meet"]
        if not elapsed:
            return Network(math.inf, math.inf, 1, (Protocol(),), meet_s)
        moved = np.array([num_bytes * (size - 1) / size for num_bytes in _MESSAGE_BYTES])

        def line(kind: str) -> tuple[float, float]:
            """Seconds of a message, and of a byte that is moved."""
            seconds = np.array([elapsed[kind, num_bytes] for num_bytes in _MESSAGE_BYTES])
            base_s, s_per_byte = fit_line(np.stack([np.ones(len(moved)), moved], 1), seconds)
            return base_s, s_per_byte or float(seconds[-1] / moved[-1])

        (base_s, s_per_byte), (_, sum_s_per_byte) = line("gather"), line("sum")  # a sum moves everything twice
        is_crowded = size * torch.get_num_threads() >= (os.cpu_count() or 1)
        return Network(
            1 / s_per_byte, 1 / s_per_byte, size, (Protocol(base_s),), meet_s,
            sum_share=2 * s_per_byte / sum_s_per_byte,
            host_s_per_byte=float(busy["gather", _MESSAGE_BYTES[-1]] / moved[-1]) if is_crowded else 0.0,
        )  # fmt: skip


def _gather(link: PairedSends, buffer: Buffer, full: torch.Tensor) -> None:
    link.all_gather(buffer, [full]).wait()


def _elapsed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls


def _over_ranks(parts: Sequence[dict[Any, list[float]]], world: World) -> list[dict[Any, float]]:
    """Of each list the median, and of these the mean over ranks."""
    mine = [{key: median(values) for key, values in part.items()} for part in parts]
    of_ranks = gather_objects(mine, world)
    return [
        {key: float(np.mean([rank[number][key] for rank in of_ranks if key in rank[number]])) for key in part}
        for number, part in enumerate(of_ranks[0])
    ]


def _with_host(device: Device, steps: dict[tuple[int, int], float], world: World, meet_s: float) -> Device:
    """`device` with what the tiny steps took beyond their operations: for each call, each pass of a unit, each step."""
    features, rest = [], []
    for (setup, layers), seconds in steps.items():
        config = ModelConfig.from_hf(_TINY | {"num_hidden_layers": layers})
        run = describe(config, _TINY_SETUPS[setup], world_size=world.size, link="shared memory", workload=_TINY_WORK)
        work = count(run)
        ops = list(_operations(work))
        features.append([sum(op.count for op in ops), sum(1 + unit.has_backward for unit in work.units), 1.0])
        rest.append(max(1e-9, seconds - device.seconds(ops) - (3 if world.size > 1 else 0) * meet_s))
    call_s, pass_s, step_s = fit_line(np.array(features), np.array(rest))
    return Device(**device.__dict__ | {"call_s": call_s, "pass_s": pass_s, "step_s": step_s})


def _operations(work: StepWork) -> Iterator[Op]:
    for unit in work.units:
        yield from unit.forward + unit.forward_head + unit.recompute + unit.backward + unit.backward_head
        exchange = unit.exchange
        yield from [update.op for update in exchange.updates]
        yield from exchange.square_sum
        for transfer in (exchange.gather, exchange.reduce):
            if transfer is not None:
                yield from transfer.prepare + transfer.finish


def fit_rates(measured: Sequence[tuple[Op, float]]) -> dict[str, Rate]:
    """A line for each kind and dtype, and what each sample was off it."""
    by_key: dict[str, list[tuple[Op, float]]] = defaultdict(list)
    for op, seconds in measured:
        by_key[f"{op.kind} {op.dtype}"].append((op, seconds))
    rates = {}
    for key, pairs in by_key.items():
        features = np.array([[1.0, op.flops, op.bytes] for op, _ in pairs])
        overhead_s, s_per_flop, s_per_byte = fit_line(features, np.array([seconds for _, seconds in pairs]))
        line = Rate(overhead_s, _inverse(s_per_flop), _inverse(s_per_byte))
        deviations = tuple(Deviation(op.flops, op.bytes, s / line.line(op.flops, op.bytes)) for op, s in pairs)
        rates[key] = Rate(line.overhead_s, line.flops_per_s, line.bytes_per_s, deviations)
    return rates


def fit_line(features: np.ndarray, values: np.ndarray) -> list[float]:
    """Coefficients >= 0, one for each column of `features`, of least squares of the relative error.

    By trying each subset of the columns: the best with a solution that is nowhere negative is the optimum."""
    best, found = math.inf, [0.0] * features.shape[1]
    relative = features / values[:, None]
    columns = [c for c in range(features.shape[1]) if features[:, c].any()]
    for size in range(1, len(columns) + 1):
        for subset in itertools.combinations(columns, size):
            scale = np.abs(relative[:, subset]).max(0)  # flops are 1e9 times what calls are
            solution = np.linalg.lstsq(relative[:, subset] / scale, np.ones(len(values)), rcond=None)[0] / scale
            error = np.square(relative[:, subset] @ solution - 1).sum()
            if (solution >= 0).all() and error < best:
                best, found = error, [0.0] * features.shape[1]
                for column, coefficient in zip(subset, solution, strict=True):
                    found[column] = float(coefficient)
    return found


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf


def _memory_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // world.size


# Processes #


def calibrate(device: str, num_processes: Sequence[int]) -> Calibration:
    """Measure with each of these numbers of processes, one number after the other, threads as `launch/torchrun.sh`
    sets them: the processors divided by the processes."""
    threads = {n: max(1, (os.cpu_count() or 1) // n) for n in num_processes}
    figures = {n: _measured(device, n, threads[n]) for n in num_processes}
    return Calibration(
        describe_machine(device),
        str(datetime.date.today()),
        threads,
        {n: of_device for n, (of_device, _) in figures.items()},
        {n: network for n, (_, network) in figures.items()},
    )


def _measured(device: str, num_processes: int, num_threads: int) -> tuple[Device, Network]:
    context = multiprocessing.get_context("spawn")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read by a spawned process when it loads torch
    try:
        with tempfile.TemporaryDirectory() as folder, context.Pool(num_processes) as pool:
            jobs = [(device, f"{folder}/store", rank, num_processes, num_threads) for rank in range(num_processes)]
            return pool.map(_one_rank, jobs, chunksize=1)[0]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _one_rank(job: tuple[str, str, int, int, int]) -> Any:
    device, store, rank, size, num_threads = job
    torch.set_num_threads(num_threads)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    try:
        world = World(rank, size, rank, torch.device(device), "gloo", dist.group.WORLD)
        calibrator = Calibrator(world)
        for _ in range(ROUNDS):
            calibrator.round()
        return calibrator.figures()
    finally:
        dist.destroy_process_group()
