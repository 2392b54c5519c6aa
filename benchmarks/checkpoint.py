"""How do minift's checkpoints compare with torch.distributed.checkpoint (DCP) in save time, stall and memory?

    python benchmarks/checkpoint.py                                   # SmolLM2-135M fully trained, 2 gloo ranks
    python benchmarks/checkpoint.py --layers 3 --tokens 64 --rounds 2   # a quick look

The state: fp32 masters and two Adam moments of every parameter, cut over the ranks. minift has it as flat shards, DCP
as DTensors cut along the first dimension under `get_state_dict`'s names, which is how `fully_shard` holds it. Each has
saved and loaded it bit for bit before anything is measured.

Save time: synchronous saves in turns, barrier to barrier, everything on the disk (both flush). minift also
reads every file back and compares checksums; DCP does not.
Stall: what an asynchronous save costs the training thread itself: the call, and the wait before the optimizer may
overwrite the state. Between the two lie forward and backward of the real model, and the update is real too. *Slowdown*
is the longer way round: the time of the steps until the save is complete, less that of as many steps without one; it
has the processor time of the writing in it, which is not hidden where every core computes.
Memory: fresh processes per variant; largest PSS summed over the ranks during a save and its steps, less that of steps
without. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that PSS is what is alive.

DCP's best settings: plans cached; staging that is kept and reused; in "dcp staged" it runs in a thread beside forward
and backward, which its documentation wants CUDA for and which works without; "dcp" is its default, staging in the call.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from processes import Ranks, run_ranks
from protocol import Times, stopwatch, take_turns
from results import Result, finish, parse
from savers import MAKERS, Dcp, Minift
from smollm2 import VOCAB_SIZE, loss_of, make_model
from torch import Tensor

from minift.dist.process import World
from minift.optim.adamw import AdamW
from minift.optim.shard import FlatShard
from minift.style import label_bars, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


# ----------------------------------------------------------------------------------------------------- in the processes


Job = tuple[argparse.Namespace, str, tuple[str, ...]]  # options, folder, variants


class Rank:
    """One process: the model that computes, and the variants' states."""

    def __init__(self, world: World, job: Job) -> None:
        self.args, folder, variants = job
        self.world, self.folder = world, Path(folder) / "checkpoint"
        self.model = make_model(self.args.layers)
        self.model.to(torch.bfloat16)
        self.variants = {name: MAKERS[name](self.model, self.world, self.folder, name) for name in variants}
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
            tensors = [t for s in variant.optimizer.shards for t in [*s.halves().values(), *states[s.name].values()]]
            for number, tensor in enumerate(tensors):
                tensor.copy_(drawn(tensor, number))
            self.empty_folder()
            variant.save()
            dist.barrier()
            for tensor in tensors:
                tensor.zero_()
            variant.load()
            for number, tensor in enumerate(tensors):
                assert torch.equal(tensor, drawn(tensor, number))

    def asynchronous(self, variant: Minift | Dcp) -> tuple[float, float]:
        """Stall and slowdown of a save, in seconds; the stall is the longest of all ranks'."""
        without_s = stopwatch(lambda: self.steps(variant), dist.barrier)()
        self.empty_folder()
        self.waited_s = 0.0

        def with_save() -> None:
            started = time.perf_counter()
            variant.begin()
            self.waited_s += time.perf_counter() - started
            self.steps(variant)
            variant.finish()

        with_s = stopwatch(with_save, dist.barrier)()
        longest_s = torch.tensor(self.waited_s, dtype=torch.float64)
        dist.all_reduce(longest_s, op=dist.ReduceOp.MAX)
        return float(longest_s), with_s - without_s


def drawn(tensor: Tensor, number: int) -> Tensor:
    """Values for `tensor`, whatever it is the state of."""
    return (1000.0 * torch.rand(len(tensor), generator=torch.Generator().manual_seed(number))).to(tensor.dtype)


def time_rank(world: World, tell: object, job: Job) -> tuple[Times, Times, dict[str, list[float]]]:
    """Synchronous saves; stalls of asynchronous ones; and their slowdown {variant: seconds by round}."""
    this = Rank(world, job)
    this.check()

    def synchronous(variant: Minift | Dcp) -> float:
        this.empty_folder()
        return stopwatch(variant.save, dist.barrier)()

    slowdowns: dict[str, list[float]] = defaultdict(list)

    def stall(name: str) -> float:
        stall_s, slowdown_s = this.asynchronous(this.variants[name])
        slowdowns[name].append(slowdown_s)
        return stall_s

    rounds, variants = this.args.rounds, this.variants
    saves = take_turns({name: lambda name=name: synchronous(variants[name]) for name in ("minift", "dcp")}, rounds)
    for name in variants:  # starts threads and fills caches
        stall(name)
    slowdowns.clear()
    stalls = take_turns({name: lambda name=name: stall(name) for name in variants}, rounds)
    return saves, stalls, dict(slowdowns)


def hold_rank(world: World, tell: Callable[[str], None], job: Job) -> None:
    """Steps, then a save and as many steps; tells the parent, who watches the memory, where it is."""
    this = Rank(world, job)
    (variant,) = this.variants.values()
    for phase in ("warm-up", "without", "with"):
        this.empty_folder()
        tell(phase)
        if phase == "with":
            variant.begin()
        this.steps(variant)
        if phase == "with":
            variant.finish()


# ---------------------------------------------------------------------------------------------------------- the parent


def measure_memory(args: argparse.Namespace, variant: str) -> float:
    """Extra MiB of an asynchronous save, summed over the ranks."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        with Ranks(args.ranks, hold_rank, (args, folder, (variant,)), RETURNING) as ranks:
            peaks = ranks.watch()
            ranks.results()
    return max(0, peaks["with"] - peaks["without"]) / 2**20


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Bars of the last run: stall, save time, memory."""
    values = runs[-1]["values"]
    panels = {
        "asynchronous: stall, ms (log)": {k: 1e3 * v for k, v in values["seconds"]["stall"].items()},
        "asynchronous: memory, MiB": values.get("async_memory_mib", {}),
        "synchronous: time, s": values["seconds"]["save"],
    }
    figure.set_size_inches(9, 2.2)
    for axes, (title, bars) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        colours = [theme.ours if name == "minift" else theme.theirs for name in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.set_title(title)
        axes.invert_yaxis()
        if title.endswith("(log)"):
            axes.set(xscale="log", xlim=(0.1, 20 * max(bars.values())))
        label_bars(axes, drawn, [three_digits(value) for value in bars.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--steps", type=int, default=2, help="during which an asynchronous save has to be complete")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="a folder on the disk to be measured; default: the system's")
    parser.add_argument("--skip-memory", action="store_true")
    args = parse(parser)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saves, stalls, slowdowns = run_ranks(args.ranks, time_rank, (args, folder, tuple(MAKERS)))[0]
    memory_mib = {} if args.skip_memory else {name: measure_memory(args, name) for name in MAKERS}
    seconds = {
        "save": {name: saves.median(name) for name in saves.seconds},
        "stall": {name: stalls.median(name) for name in MAKERS},
        "slowdown": {name: statistics.median(slowdowns[name]) for name in MAKERS},
    }
    print(f"{args.ranks} ranks, {args.layers} layers, {args.rounds} rounds; medians")
    print(f"{'':14}{'save, s':>10}{'stall, ms':>12}{'slowdown, s':>14}{'memory, MiB':>14}")
    for name in MAKERS:
        save = f"{seconds['save'][name]:.2f}" if name in seconds["save"] else ""
        memory = f"{memory_mib[name]:.0f}" if memory_mib else ""
        print(f"{name:14}{save:>10}{1e3 * seconds['stall'][name]:12.1f}{seconds['slowdown'][name]:14.2f}{memory:>14}")

    result = Result("checkpoint")
    result.count(saves)
    result.count(stalls)
    result.values = {
        "save_time_ratio": saves.ratio("dcp", "minift").median,
        "async_stall_ratio": stalls.ratio("minift", "dcp staged").median,
        "async_stall_ratio_to_default": stalls.ratio("minift", "dcp").median,
        "seconds": seconds,
    }
    if memory_mib:
        result.values["async_memory_ratio"] = memory_mib["minift"] / min(memory_mib["dcp"], memory_mib["dcp staged"])
        result.values["async_memory_mib"] = memory_mib
    finish(args, result, draw)


if __name__ == "__main__":
    main()
