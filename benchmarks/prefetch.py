"""What does prefetching weights gain, and what does it look like?

    python benchmarks/prefetch.py                       # 2 ranks, links of 2.5 Gbit/s
    python benchmarks/prefetch.py --picture prefetch.png

The model has the shapes of SmolLM2-135M, with fewer layers, and fewer tokens in its vocabulary: embedding and head
belong to the root, which is gathered before the first layer can start, with or without prefetching. One engine for each
of `prefetch_units` 0, 1 and 2 lives in the same two gloo processes; their losses must be equal to the bit, because
prefetching changes when weights come and never what they are. Then they take steps in turns.

Memory of one machine is no network. `SlowLinks` therefore delays each collective until its bytes would have crossed a
link of the given speed. Times over the machine's own memory, undelayed, are told too. The picture shows the fastest
steps over the slow link without and with prefetching beneath each other; there a collective lasts until its bytes had
crossed, and a wait that goes on is one for the other rank.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from processes import run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from slow_links import SlowLinks
from smollm2 import Trainee, random_batch

from minift.data.batch import Batch
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.timeline import draw_panels, summary
from minift.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

PREFETCH_UNITS = (0, 1, 2)
CHECK_STEPS = 3
LINKS = ("slow", "undelayed")


class Variant(Trainee):
    """One engine over links that can be made slow, and the traces of its timed steps."""

    def __init__(self, world: World, args: argparse.Namespace, prefetch_units: int) -> None:
        policy = ShardPolicy(prefetch_units=prefetch_units)
        super().__init__(world, args.layers, args.vocab, policy=policy, connect=self._connect)
        self.traces: dict[str, list[Trace]] = {link: [] for link in LINKS}

    def _connect(self, world: World) -> SlowLinks:
        self.links = SlowLinks(world)
        return self.links

    def turn(self, link: str, batches: Iterator[Batch], slow_bytes_per_second: float) -> Turn:
        """A step over `link`, recorded."""

        def step() -> None:
            self.recorder.start()
            self.step([next(batches)])

        timed = stopwatch(step, dist.barrier)

        def turn() -> float:
            self.links.bytes_per_second = slow_bytes_per_second if link == "slow" else math.inf
            self.links.arrivals.clear()
            seconds = timed()
            started = time.perf_counter() - seconds
            trace = self.recorder.stop()
            if link == "slow":
                trace = cut_off(trace, [at - started for at in self.links.arrivals])
            self.traces[link].append(trace)
            return seconds

        return turn


def cut_off(trace: Trace, arrivals_s: list[float]) -> Trace:
    """`trace` with collectives that last until their bytes had crossed, instead of until their result was wanted."""
    collectives = sorted((span for span in trace.spans if span.lane != "compute"), key=lambda span: span.start_s)
    others = [span for span in trace.spans if span.lane == "compute"]
    return replace(trace, spans=others + [
        replace(span, stop_s=min(span.stop_s, arrival)) for span, arrival in zip(collectives, arrivals_s, strict=True)
    ])  # fmt: skip


Variants = dict[tuple[str, int], list[Trace]]  # (link, prefetch_units): traces of the steps in order


def measure(world: World, tell: object, args: argparse.Namespace) -> tuple[Times, Variants]:
    """What one process does."""
    engines = {units: Variant(world, args, units) for units in PREFETCH_UNITS}
    losses = {}
    for units, engine in engines.items():
        batches = batches_for(args, world.rank)
        losses[str(units)] = [engine.step([next(batches)]) for _ in range(CHECK_STEPS)]
    check_losses(losses, 0.0)
    turns = {
        f"{link}, {units}": engine.turn(link, batches_for(args, world.rank), args.link_gbit * 1e9 / 8)
        for link in LINKS
        for units, engine in engines.items()
    }
    times = take_turns(turns, args.rounds)
    return times, {(link, units): engine.traces[link] for link in LINKS for units, engine in engines.items()}


def batches_for(args: argparse.Namespace, rank: int) -> Iterator[Batch]:
    for number in itertools.count():
        yield random_batch(args.tokens + 1, 1000 * number + rank, args.vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--link-gbit", type=float, default=2.5, help="speed of the slow link in Gbit/s, each way")
    parser.add_argument("--rounds", type=int, default=9)
    args = parse(parser)

    per_rank = run_ranks(args.ranks, measure, args)
    times = per_rank[0][0]
    result = Result("prefetch")
    result.count(times)
    print(f"{args.ranks} ranks, {args.tokens} tokens each, {args.layers} layers; slow: {args.link_gbit} Gbit/s a way")
    print(f"{'':20}{'median':>24}   {'fastest step':>24}")
    print(f"{'link':11}{'prefetch':>9}{'s a step':>12}{'speedup':>12}{'seconds':>12}{'waiting':>9}{'hidden':>9}")
    fastest_traces = {}
    for link, units in itertools.product(LINKS, PREFETCH_UNITS):
        name = f"{link}, {units}"
        fastest = min(times.counted_rounds(), key=lambda number, name=name: times.seconds[name][number])
        traces = fastest_traces[link, units] = [variants[link, units][fastest] for _, variants in per_rank]
        numbers = summary(traces)
        row = {
            "link": link,
            "prefetch_units": units,
            "step_seconds": times.median(name),
            "speedup": times.ratio(f"{link}, 0", name).median,
            "fastest_step_seconds": times.fastest(name),
            "fastest_step_wait_seconds": numbers["wait_s"],
            # Undelayed, nobody knows when a collective was done: only the wait is known.
            "fastest_step_hidden_share": numbers["hidden_share"] if link == "slow" else None,
        }
        result.rows.append(row)
        hidden = f"{numbers['hidden_share']:.0%}" if link == "slow" else ""
        print(
            f"{link:11}{units:9}{row['step_seconds']:12.3f}{row['speedup']:11.2f}x{row['fastest_step_seconds']:12.3f}"
            f"{numbers['wait_s']:9.3f}{hidden:>9}"
        )
    slow = {row["prefetch_units"]: row for row in result.rows if row["link"] == "slow"}
    result.values = {
        "prefetch_speedup": slow[1]["speedup"],
        "hidden_share": slow[1]["fastest_step_hidden_share"],
        "speedup_undelayed": next(row["speedup"] for row in result.rows[len(slow) :] if row["prefetch_units"] == 1),
    }

    def draw(figure: Figure, theme: Theme, runs: object) -> None:
        """The steps just taken: what is kept has no spans."""
        panels = {}
        for units in (0, 1):
            traces = fastest_traces["slow", units][:1]
            waiting = summary(traces)["wait_s"]
            seconds = slow[units]["fastest_step_seconds"]
            panels[f"prefetch_units {units}: {seconds:.3f} s, of which {waiting:.3f} s waiting"] = traces
        draw_panels(figure, theme, panels)

    finish(args, result, draw)


if __name__ == "__main__":
    main()
