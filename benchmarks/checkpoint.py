"""How do minift's checkpoints compare with torch.distributed.checkpoint (DCP) in save time, stall and memory?

    python benchmarks/checkpoint.py                                   # SmolLM2-135M fully trained, 2 gloo ranks
    python benchmarks/checkpoint.py --layers 3 --tokens 64 --rounds 2   # a quick look

The state: fp32 masters and two Adam moments of every parameter, cut over the ranks. minift has it as flat shards, DCP
as DTensors cut along the first dimension under `get_state_dict`'s names, which is how `fully_shard` holds it. Each has
saved and loaded it bit for bit before anything is measured.

Save time: synchronous saves in turns (AB BA ...), barrier to barrier, everything on the disk (both flush). minift also
reads every file back and compares checksums; DCP does not.
Stall: what an asynchronous save costs the training thread itself: the call, and the wait before the optimizer may
overwrite the state. Between the two lie forward and backward of the real model, and the update is real too. *Slowdown*
is the longer way round: the time of the steps until the save is complete, less that of as many steps without one; it
has the processor time of the writing in it, which is not hidden where every core computes.
Memory: fresh processes per variant; largest PSS summed over the ranks during a save and its steps, less that of steps
without. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that PSS is what is alive.

DCP's best settings: plans cached; staging that is kept and reused; in "dcp staged" it runs in a thread beside forward
and backward, which its documentation wants CUDA for and which works without; "dcp" is its default, staging in the call.

Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import pss_bytes, spawn
from smollm2 import VOCAB_SIZE, loss_of, make_model
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from minift.checkpoint.manifest import Standing
from minift.checkpoint.saver import Saver
from minift.checkpoint.sharded import load_checkpoint
from minift.dist.process import World
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

# -------------------------------------------------------------------------------------------------------- the variants


class Minift:
    """Flat shards of the units of `model`, saved by a `Saver`, which waits in the optimizer."""

    def __init__(self, model: CausalLM, world: World, folder: Path, name: str) -> None:
        self.world, self.folder = world, folder
        units: dict[str, list[ParamRange]] = defaultdict(list)
        for key, parameter in model.named_parameters():
            ranges = units[key.split(".")[2] if key.startswith("model.layers.") else "root"]
            start, numel = ranges[-1].stop if ranges else 0, parameter.numel() // world.size
            ranges.append(ParamRange(key, start, start + numel, world.rank * numel, tuple(parameter.shape)))
        shards = [
            FlatShard(unit, torch.zeros(ranges[-1].stop), torch.full((ranges[-1].stop,), 1e-3), ranges)
            for unit, ranges in units.items()
        ]
        self.optimizer = AdamW(shards, OptimConfig())
        self._saver = Saver(folder, self.optimizer, world, replace(world, rank=0, size=1), keep_last=1)

    def begin(self) -> None:
        """Start to save in the background."""
        self._saver.start(Standing(1, {}, {}))

    def finish(self) -> None:
        self._saver.wait()

    def save(self) -> None:
        self.begin()
        self.finish()

    def load(self) -> None:
        load_checkpoint(self.folder / "step-00000001", self.optimizer, self.world)


class Dcp:
    """DTensors of every parameter and moment, each in memory of its own, as `fully_shard` has them."""

    def __init__(self, model: CausalLM, world: World, folder: Path, name: str) -> None:
        self.folder = folder
        mesh = init_device_mesh("cpu", (world.size,))
        shards, shapes = [], {}
        for key, parameter in model.named_parameters():
            numel = parameter.numel() // world.size
            shapes[key] = (parameter.shape[0] // world.size, *parameter.shape[1:])
            everything = [ParamRange(key, 0, numel, world.rank * numel, tuple(parameter.shape))]
            shards.append(FlatShard(key, torch.zeros(numel), torch.full((numel,), 1e-3), everything))
        self.optimizer = AdamW(shards, OptimConfig())
        self.optimizer.before_update = self._wait_for_staging

        def whole(key: str, local: Tensor) -> DTensor:
            return DTensor.from_local(local.view(shapes[key]), mesh, [Shard(0)])

        states = self.optimizer.state_dict()
        moments = {s.name: {what: whole(s.name, t) for what, t in states[s.name].items()} for s in shards}
        self._state = {"model": {s.name: whole(s.name, s.master) for s in shards}, "optim": {"state": moments}}
        self._planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        self._stager = DefaultStager(StagingOptions(False, False, True, False)) if name == "dcp staged" else None
        self._staged: Future | None = None

    def begin(self) -> None:
        writer = dcp.FileSystemWriter(self.folder)
        self._uploaded = dcp.async_save(
            self._state, storage_writer=writer, planner=self._planner, async_stager=self._stager
        )
        if self._stager is not None:
            self._staged, self._uploaded = self._uploaded.staging_completion, self._uploaded.upload_completion

    def _wait_for_staging(self, shard: FlatShard) -> None:
        if self._staged is not None:
            self._staged.result()

    def finish(self) -> None:
        self._uploaded.result()

    def save(self) -> None:
        dcp.save(self._state, storage_writer=dcp.FileSystemWriter(self.folder), planner=self._planner)

    def load(self) -> None:
        dcp.load(self._state, storage_reader=dcp.FileSystemReader(self.folder))


MAKERS = {"minift": Minift, "dcp staged": Dcp, "dcp": Dcp}


# ----------------------------------------------------------------------------------------------------- in the processes


@dataclass(frozen=True)
class Job:
    args: argparse.Namespace
    folder: Path
    variants: tuple[str, ...]


class Rank:
    """One process: the model that computes, and the variants' states."""

    def __init__(self, rank: int, job: Job) -> None:
        torch.set_num_threads(1)
        self.args, self.folder = job.args, job.folder / "checkpoint"
        store = dist.FileStore(str(job.folder / "store"), job.args.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.args.ranks)
        self.world = World(rank, job.args.ranks, rank, torch.device("cpu"), "gloo", dist.group.WORLD)
        self.model = make_model(job.args.layers)
        self.model.to(torch.bfloat16)
        self.variants = {name: MAKERS[name](self.model, self.world, self.folder, name) for name in job.variants}
        self.waited_s = 0.0
        for variant in self.variants.values():
            self._measure_fence(variant.optimizer)

    def _measure_fence(self, optimizer: AdamW) -> None:
        fence = optimizer.before_update

        def measured(shard: FlatShard) -> None:
            started = time.perf_counter()
            fence(shard)
            self.waited_s += time.perf_counter() - started

        optimizer.before_update = measured

    def steps(self, variant: Minift | Dcp) -> None:
        """Forward and backward of one document, and the update, several times."""
        tokens_T = torch.randint(VOCAB_SIZE, (self.args.tokens + 1,))
        for _ in range(self.args.steps):
            loss_of(self.model, tokens_T).backward()
            self.model.zero_grad(set_to_none=True)
            variant.optimizer.step(1.0)

    def empty_folder(self) -> None:
        dist.barrier()
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.sync()
        dist.barrier()

    def check(self) -> None:
        """Every variant gives back the bits that it was given."""
        for variant in self.variants.values():
            states = variant.optimizer.state_dict()
            tensors = [t for s in variant.optimizer.shards for t in (s.master, *states[s.name].values())]
            for number, tensor in enumerate(tensors):
                tensor.copy_(torch.rand(len(tensor), generator=torch.Generator().manual_seed(number)))
            self.empty_folder()
            variant.save()
            dist.barrier()
            for tensor in tensors:
                tensor.zero_()
            variant.load()
            for number, tensor in enumerate(tensors):
                assert torch.equal(tensor, torch.rand(len(tensor), generator=torch.Generator().manual_seed(number)))

    def timed(self, run: Callable[[], None]) -> float:
        dist.barrier()
        started = time.perf_counter()
        run()
        dist.barrier()
        return time.perf_counter() - started

    def asynchronous(self, variant: Minift | Dcp) -> tuple[float, float]:
        """Stall and slowdown of a save, in seconds; the stall is the longest of all ranks'."""
        without_s = self.timed(lambda: self.steps(variant))
        self.empty_folder()
        self.waited_s = 0.0

        def with_save() -> None:
            started = time.perf_counter()
            variant.begin()
            self.waited_s += time.perf_counter() - started
            self.steps(variant)
            variant.finish()

        with_s = self.timed(with_save)
        longest_s = torch.tensor(self.waited_s, dtype=torch.float64)
        dist.all_reduce(longest_s, op=dist.ReduceOp.MAX)
        return float(longest_s), with_s - without_s


def time_rank(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """{"save" | "stall" | "slowdown": {variant: seconds per round}}"""
    this = Rank(rank, job)
    this.check()
    seconds: dict[str, dict[str, list[float]]] = {kind: {} for kind in ("save", "stall", "slowdown")}
    for round_ in range(job.args.rounds):
        for name in ("minift", "dcp") if round_ % 2 == 0 else ("dcp", "minift"):
            this.empty_folder()
            seconds["save"].setdefault(name, []).append(this.timed(this.variants[name].save))
    for round_ in range(-1, job.args.rounds):
        for name in list(job.variants)[:: 1 if round_ % 2 == 0 else -1]:
            stall_s, slowdown_s = this.asynchronous(this.variants[name])
            if round_ >= 0:  # the one before starts threads and fills caches
                seconds["stall"].setdefault(name, []).append(stall_s)
                seconds["slowdown"].setdefault(name, []).append(slowdown_s)
    results.put((rank, seconds))


def hold_rank(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """Steps, then a save and as many steps; tells the parent, who watches the memory, where it is."""
    this = Rank(rank, job)
    (variant,) = this.variants.values()
    for phase in ("warm-up", "without", "with"):
        this.empty_folder()
        results.put(phase)
        if phase == "with":
            variant.begin()
        this.steps(variant)
        if phase == "with":
            variant.finish()
    results.put("done")
    time.sleep(1.0)


# ---------------------------------------------------------------------------------------------------------- the parent



def measure_time(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        job = Job(args, Path(folder), tuple(MAKERS))
        processes, results = spawn(time_rank, args.ranks, job, {"OMP_NUM_THREADS": "1"})
        per_rank = sorted((results.get(timeout=1800) for _ in processes), key=lambda result: result[0])
        for process in processes:
            process.join()
    return per_rank[0][1]


def measure_memory(args: argparse.Namespace, variant: str) -> int:
    """Extra bytes of an asynchronous save, summed over the ranks."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        processes, results = spawn(hold_rank, args.ranks, Job(args, Path(folder), (variant,)), environment)
        peaks, seen, phase = defaultdict(int), Counter(), "start"
        while seen["done"] == 0:
            peaks[phase] = max(peaks[phase], sum(pss_bytes(process.pid) for process in processes))
            while not results.empty():
                phase = results.get()
                seen[phase] += 1
        for process in processes:
            process.join()
    return max(0, peaks["with"] - peaks["without"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--steps", type=int, default=2, help="during which an asynchronous save has to be complete")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="a folder on the disk to be measured; default: the system's")
    parser.add_argument("--skip-memory", action="store_true")
    args = parser.parse_args()

    seconds = measure_time(args)
    memory = {} if args.skip_memory else {name: measure_memory(args, name) for name in MAKERS}
    print(f"{args.ranks} ranks, {args.layers} layers, {args.rounds} rounds; medians, fastest in parentheses")
    print(f"{'':14}{'save, s':>16}{'stall, ms':>20}{'slowdown, s':>18}{'memory, MiB':>14}")
    for name in MAKERS:
        cells = []
        for kind, unit in (("save", 1), ("stall", 1e3), ("slowdown", 1)):
            values = [value * unit for value in seconds[kind].get(name, [])]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f})" if values else "")
        extra = f"{memory[name] / 2**20:.0f}" if memory else ""
        print(f"{name:14}{cells[0]:>16}{cells[1]:>20}{cells[2]:>18}{extra:>14}")

    def ratio(kind: str, over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[kind][over], seconds[kind][under], strict=True))

    result = {
        "benchmark": "checkpoint",
        "save_time_ratio": ratio("save", "dcp", "minift"),
        "async_stall_ratio": ratio("stall", "minift", "dcp staged"),
        "async_stall_ratio_to_default": ratio("stall", "minift", "dcp"),
        "seconds": {k: {name: statistics.median(v) for name, v in values.items()} for k, values in seconds.items()},
    }
    if memory:
        result |= {
            "async_memory_ratio": memory["minift"] / min(memory["dcp"], memory["dcp staged"]),
            "async_memory_mib": {name: value / 2**20 for name, value in memory.items()},
        }
    result |= vars(args) | {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
