"""What does prefetching weights gain, and what does it look like?

    python benchmarks/prefetch.py                                             # 2 ranks, links of 2.5 Gbit/s
    python benchmarks/prefetch.py --output benchmarks/results/<date>_<machine>_prefetch.png

The model has the shapes of SmolLM2-135M, with fewer layers, and fewer tokens in its vocabulary: embedding and head
belong to the root, which is gathered before the first layer can start, with or without prefetching. One engine for each
of `prefetch_units` 0, 1 and 2 lives in the same two gloo processes; their losses must be equal to the bit, because
prefetching changes when weights come and never what they are. Then they take steps in turns (0 1 2, 2 1 0, ...), and a
speedup is the median of the ratios of neighbouring steps.

Memory of one machine is no network. `SlowLinks` therefore delays each collective until its bytes would have crossed a
link of the given speed, one collective behind the other, while the process sleeps or computes. Times over the machine's
own memory, undelayed, are told too. With --output the fastest steps over the slow link without and with prefetching are
drawn beneath each other, and there a collective lasts until its bytes had crossed; a wait that goes on is one for the
other rank. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from smollm2 import loss_of, make_model
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.fsdp.transport import Buffer, PairedSends, Pending
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.precision import Precision
from minift.timeline import draw_stacked, summary
from minift.trace import Recorder, Trace

PREFETCH_UNITS = (0, 1, 2)
CHECK_STEPS = 3
LINKS = ("slow", "undelayed")


class SlowLinks(PairedSends):
    """Paired sends over a link that carries `bytes_per_second` each way, for all collectives of the rank in turn."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.bytes_per_second = math.inf
        self.arrivals: list[float] = []
        """When each collective's bytes had crossed, in the order of issue; seconds of time.perf_counter()."""

    def all_gather(self, buffer: Buffer, fulls: list[Tensor]) -> Pending:
        return self._delayed(super().all_gather(buffer, fulls), fulls)

    def reduce_scatter(self, buffer: Buffer, fulls: list[Tensor], outs: list[Tensor], accumulate: bool) -> Pending:
        return self._delayed(super().reduce_scatter(buffer, fulls, outs, accumulate), fulls)

    def _delayed(self, pending: Pending, fulls: list[Tensor]) -> Pending:
        crossing_bytes = sum(full.nbytes for full in fulls) * (self.world.size - 1) / self.world.size
        free_at = max([time.perf_counter(), *self.arrivals[-1:]])
        arrives_at = free_at + crossing_bytes / self.bytes_per_second
        self.arrivals.append(arrives_at)

        def finish() -> None:
            time.sleep(max(0.0, arrives_at - time.perf_counter()))
            pending.wait()

        return Pending(finish=finish)


class Variant:
    """One engine and what it takes to step it."""

    def __init__(self, args: argparse.Namespace, world: World, prefetch_units: int) -> None:
        model = make_model(args.layers, args.vocab)
        self.model = model
        self.recorder = Recorder(world.rank, world.device)
        self.engine = shard(
            model, model.shard_units(), world, ShardPolicy(prefetch_units=prefetch_units), Precision(),
            self.recorder, connect=self._connect,
        )  # fmt: skip
        config = OptimConfig(lr=1e-4, weight_decay=0.0, max_grad_norm=None)
        self.optimizer = AdamW(self.engine.trainable_shards(), config)

    def _connect(self, world: World) -> SlowLinks:
        self.links = SlowLinks(world)
        return self.links

    def step(self, tokens_T: Tensor) -> float:
        """This rank's mean loss, before the update."""
        length = len(tokens_T) - 1
        loss = loss_of(self.model, tokens_T)
        (loss / (self.engine.world.size * length)).backward()
        with self.recorder.during("compute", "optimizer", ""):
            self.optimizer.step(1.0)
        self.engine.weights_changed()
        self.engine.clear_gradients()
        return float(loss.detach()) / length

    def timed_step(self, tokens_T: Tensor, bytes_per_second: float) -> Timed:
        self.links.bytes_per_second = bytes_per_second
        self.links.arrivals.clear()
        dist.barrier()
        started = time.perf_counter()
        self.recorder.start()
        self.step(tokens_T)
        dist.barrier()
        seconds = time.perf_counter() - started
        trace = self.recorder.stop()
        if math.isfinite(bytes_per_second):
            trace = cut_off(trace, [at - started for at in self.links.arrivals])
        return Timed(seconds, trace)


@dataclass(frozen=True)
class Timed:
    """One step."""

    seconds: float
    trace: Trace


def cut_off(trace: Trace, arrivals_s: list[float]) -> Trace:
    """`trace` with collectives that last until their bytes had crossed, instead of until their result was wanted."""
    collectives = sorted((span for span in trace.spans if span.lane != "compute"), key=lambda span: span.start_s)
    others = [span for span in trace.spans if span.lane == "compute"]
    return replace(trace, spans=others + [
        replace(span, stop_s=min(span.stop_s, arrival)) for span, arrival in zip(collectives, arrivals_s, strict=True)
    ])  # fmt: skip


Results = dict[tuple[str, int], list[Timed]]  # (link, prefetch_units) -> steps in order


def measure(rank: int, args: argparse.Namespace, store: str, results: multiprocessing.Queue) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, args.ranks), rank=rank, world_size=args.ranks)
    world = World(rank, args.ranks, rank, torch.device("cpu"), "gloo", dist.group.WORLD)
    variants = {units: Variant(args, world, units) for units in PREFETCH_UNITS}
    losses = {units: [variant.step(tokens_for(args, rank, n)) for n in range(CHECK_STEPS)] for units, variant in
              variants.items()}  # fmt: skip
    assert all(theirs == losses[0] for theirs in losses.values()), f"losses differ on rank {rank}: {losses}"
    timed: Results = {(link, units): [] for link in LINKS for units in PREFETCH_UNITS}
    for round_ in range(args.rounds):
        tokens_T = tokens_for(args, rank, CHECK_STEPS + round_)
        for link in LINKS:
            for units in PREFETCH_UNITS[:: 1 if round_ % 2 == 0 else -1]:
                bytes_per_second = args.link_gbit * 1e9 / 8 if link == "slow" else math.inf
                timed[link, units].append(variants[units].timed_step(tokens_T, bytes_per_second))
    results.put((rank, timed))
    dist.destroy_process_group()


def tokens_for(args: argparse.Namespace, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(args.vocab, (args.tokens + 1,), generator=generator)


def measure_all(args: argparse.Namespace) -> list[Results]:
    """Every rank's results."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=measure, args=(rank, args, f"{folder}/store", results)) for rank in range(args.ranks)
        ]
        for process in processes:
            process.start()
        per_rank = sorted((results.get(timeout=1800) for _ in processes), key=lambda result: result[0])
        for process in processes:
            process.join()
    return [timed for _, timed in per_rank]


def fastest_step(per_rank: list[Results], variant: tuple[str, int]) -> list[Trace]:
    """All ranks' traces of the step that was least disturbed by other load."""
    steps = per_rank[0][variant]
    fastest = min(range(len(steps)), key=lambda number: steps[number].seconds)
    return [timed[variant][fastest].trace for timed in per_rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--link-gbit", type=float, default=2.5, help="speed of the slow link in Gbit/s, each way")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="PNG file for the picture")
    args = parser.parse_args()

    per_rank = measure_all(args)
    seconds = {variant: [step.seconds for step in steps] for variant, steps in per_rank[0].items()}
    table = {}
    print(f"{args.ranks} ranks, {args.tokens} tokens each, {args.layers} layers; slow: {args.link_gbit} Gbit/s a way")
    print(f"{'':20}{'median':>24}   {'fastest step':>24}")
    print(f"{'link':11}{'prefetch':>9}{'s a step':>12}{'speedup':>12}{'seconds':>12}{'waiting':>9}{'hidden':>9}")
    for link, units in seconds:
        fastest = summary(fastest_step(per_rank, (link, units)))
        row = table[f"{link}, {units}"] = {
            "step_seconds": statistics.median(seconds[link, units]),
            "speedup": statistics.median(a / b for a, b in zip(seconds[link, 0], seconds[link, units], strict=True)),
            "fastest_step_seconds": min(seconds[link, units]),
            "fastest_step_wait_seconds": fastest["wait_s"],
            # Undelayed, nobody knows when a collective was done: only the wait is known.
            "fastest_step_hidden_share": fastest["hidden_share"] if link == "slow" else None,
        }
        hidden = "" if row["fastest_step_hidden_share"] is None else f"{fastest['hidden_share']:.0%}"
        print(
            f"{link:11}{units:9}{row['step_seconds']:12.3f}{row['speedup']:11.2f}x{row['fastest_step_seconds']:12.3f}"
            f"{fastest['wait_s']:9.3f}{hidden:>9}"
        )
    if args.output is not None:
        panels = {}
        for units in (0, 1):
            traces = fastest_step(per_rank, ("slow", units))
            waiting = summary(traces[:1])["wait_s"]
            title = f"prefetch_units {units}: {min(seconds['slow', units]):.3f} s, of which {waiting:.3f} s waiting"
            panels[title] = traces[:1]
        draw_stacked(panels, args.output)
    settings = vars(args) | {"output": args.output and str(args.output)}
    machine = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": "prefetch", "results": table, **settings, **machine}))


if __name__ == "__main__":
    main()
