"""What does accumulating gradients cost with communication after every microbatch, and with it once a step?

    python benchmarks/accumulation.py                   # 2 ranks, links of 2.5 Gbit/s, 1, 2 and 4 microbatches

zero1 adds gradients of all microbatches up in whole buffers and reduces once a step; zero2 and zero3 reduce after every
microbatch, so that gradients stay sharded; zero3 also gathers the weights for each. All take the same steps (losses are
compared first) over links of the given speed (`slow_links`), in turns, with as many microbatches, of the same size
each. The table has what a rank sends and what its gradients take (whole buffers, shards, what is being reduced).

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from processes import run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from slow_links import SlowLinks
from smollm2 import Trainee, random_batch

from minift.dist.process import World
from minift.fsdp import ShardPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

POLICIES = {
    "zero3": ShardPolicy(),
    "zero3, kept": ShardPolicy(reshard_after_forward=False),
    "zero2": ShardPolicy(strategy="zero2"),
    "zero1": ShardPolicy(strategy="zero1"),
}
CHECK_STEPS = 2
LOSS_TOLERANCE = 1e-3  # gradients of several microbatches are summed before or after bf16 was sent


def measure(world: World, tell: object, args: argparse.Namespace) -> list[tuple[Times, dict[str, dict[str, float]]]]:
    """For each number of microbatches: times, and MiB of each policy."""
    connect = functools.partial(SlowLinks, bytes_per_second=args.link_gbit * 1e9 / 8)
    trainees = {
        name: Trainee(world, args.layers, args.vocab, policy=policy, connect=connect)
        for name, policy in POLICIES.items()
    }

    def step(trainee: Trainee, count: int, number: int) -> float:
        seeds = [1000 * number + world.size * microbatch + world.rank for microbatch in range(count)]
        return trainee.step([random_batch(args.tokens + 1, seed, args.vocab) for seed in seeds])

    def turn(trainee: Trainee, count: int) -> Turn:
        numbers = itertools.count(CHECK_STEPS)
        return stopwatch(lambda: step(trainee, count, next(numbers)), dist.barrier)

    found = []
    for count in args.microbatches:
        losses = {name: [step(t, count, n) for n in range(CHECK_STEPS)] for name, t in trainees.items()}
        check_losses(losses, LOSS_TOLERANCE)
        mib = {}
        for name, trainee in trainees.items():
            before = trainee.engine.sent_bytes()
            step(trainee, count, 0)
            mib[name] = {
                "sent": (trainee.engine.sent_bytes() - before) / 2**20,
                "gradients": trainee.engine.held_bytes()["gradients"] / 2**20,
            }
        found.append((take_turns({name: turn(t, count) for name, t in trainees.items()}, args.rounds), mib))
    return found


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 3.4)
    left, right = figure.subplots(1, 2)
    for name, colour in zip(POLICIES, theme.series, strict=False):
        own = [row for row in rows if row["policy"] == name]
        counts = [str(row["microbatches"]) for row in own]
        style = {"color": colour, "marker": "o", "label": name}
        left.plot(counts, [row["seconds_per_microbatch"] for row in own], **style)
        right.plot(counts, [row["sent_mib"] / row["microbatches"] for row in own], **style)
    left.set(title="seconds per microbatch", xlabel="microbatches in a step", ylim=(0, None))
    right.set(title="MiB that a rank sends per microbatch", xlabel="microbatches in a step", ylim=(0, None))
    left.legend(loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=256, help="per rank and microbatch")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--link-gbit", type=float, default=2.5, help="speed of the links in Gbit/s, each way")
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)

    result = Result("accumulation")
    print(f"{args.ranks} ranks, {args.layers} layers, {args.tokens} tokens a microbatch, {args.link_gbit} Gbit/s a way")
    print(f"{'microbatches':14}{'policy':14}{'s a step':>10}{'s a microbatch':>16}{'sent':>10}{'gradients, MiB':>15}")
    for count, (times, mib) in zip(args.microbatches, run_ranks(args.ranks, measure, args)[0], strict=True):
        result.count(times)
        for name in POLICIES:
            row = {
                "microbatches": count,
                "policy": name,
                "step_seconds": times.median(name),
                "seconds_per_microbatch": times.median(name) / count,
                "zero3_to_it": times.ratio("zero3", name).median,
                "sent_mib": mib[name]["sent"],
                "gradients_mib": mib[name]["gradients"],
            }
            result.rows.append(row)
            print(
                f"{count:<14}{name:14}{row['step_seconds']:10.3f}{row['seconds_per_microbatch']:16.3f}"
                f"{row['sent_mib']:10.1f}{row['gradients_mib']:15.1f}"
            )
    most = max(args.microbatches)
    result.values = {
        f"zero3_over_{row['policy']}": row["zero3_to_it"]
        for row in result.rows
        if row["microbatches"] == most and row["policy"] in ("zero1", "zero2")
    }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
