"""What does each precision policy cost in time and memory, and how far does training get with it?

    python benchmarks/precision_policies.py             # full fine-tuning, SmolLM2's shapes with 8 layers, 2 ranks

Every policy first takes the same steps over a few documents, again and again, so that the loss falls; its last loss is
compared with that of fp32 throughout, and may differ by what its formats round (LOSS_TOLERANCE, a sanity check: the
table has the difference). Then all live in the same processes and take steps in turns. Memory comes from fresh
processes: the largest peak of any rank, less what it held before it had a model. Tensors are sent between ranks, as
between hosts.

fp16 is left out unless asked for: CPUs have no fast products of fp16.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from processes import RETURNING, PeakResident, resident_bytes, run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import Trainee, random_batch

from minift.dist.process import World
from minift.fsdp.transport import PairedSends
from minift.precision import Precision
from minift.style import label_bars, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

POLICIES = {
    "fp32": Precision(wire="float32"),
    "fp32, bf16 reduce": Precision(wire="float32", reduce="bfloat16"),
    "bf16": Precision(),
    "bf16, bf16 reduce": Precision(reduce="bfloat16"),
    "bf16, bf16 master": Precision(master="bfloat16", stochastic_rounding=True),
    "fp16": Precision(wire="float16"),
}
LOSS_TOLERANCE = 0.05
NUM_DOCUMENTS = 4  # per rank, learnt by heart
DEFAULT = "bf16"


def make(world: World, args: argparse.Namespace, name: str) -> Trainee:
    return Trainee(world, args.layers, args.vocab, precision=POLICIES[name], connect=PairedSends, lr=1e-3)


def step(trainee: Trainee, world: World, args: argparse.Namespace, number: int) -> float:
    document = 1000 * (number % NUM_DOCUMENTS) + world.rank
    return trainee.step([random_batch(args.tokens + 1, document, args.vocab)])


def time_policies(world: World, tell: object, args: argparse.Namespace) -> tuple[Times, dict[str, list[float]]]:
    trainees = {name: make(world, args, name) for name in args.policies}
    losses = {
        name: [step(trainee, world, args, n) for n in range(args.loss_steps)] for name, trainee in trainees.items()
    }

    def turn(trainee: Trainee) -> Turn:
        numbers = itertools.count()
        return stopwatch(lambda: step(trainee, world, args, next(numbers)), dist.barrier)

    return take_turns({name: turn(trainee) for name, trainee in trainees.items()}, args.rounds), losses


def hold(world: World, tell: object, job: tuple[argparse.Namespace, str]) -> float:
    """Peak MiB of this rank."""
    args, name = job
    before = resident_bytes()
    trainee = make(world, args, name)
    for number in range(2):
        step(trainee, world, args, number)
    dist.barrier()
    peak = PeakResident()
    for number in range(2, 5):
        step(trainee, world, args, number)
    return (peak.bytes() - before) / 2**20


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 0.9 + 0.36 * len(rows))
    names = [row["policy"] for row in rows]
    panels = {
        "seconds a step": [row["step_seconds"] for row in rows],
        "peak MiB per rank": [row.get("peak_mib", 0.0) for row in rows],
        "last loss, above fp32, %": [100 * row["loss_above_fp32"] for row in rows],
    }
    for axes, (title, values) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        colours = [theme.ours if name == DEFAULT else theme.quiet for name in names]
        label_bars(axes, axes.barh(names, values, color=colours), [three_digits(value) for value in values])
        axes.set_title(title)
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=[p for p in POLICIES if p != "fp16"], choices=POLICIES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="per rank and step")
    parser.add_argument("--loss-steps", type=int, default=24, help="after which losses are compared")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-memory", action="store_true")
    args = parse(parser)
    if "fp32" not in args.policies:
        raise SystemExit("--policies needs fp32, which the others are compared with")

    times, losses = run_ranks(args.ranks, time_policies, args)[0]
    check_losses({name: values[-NUM_DOCUMENTS:] for name, values in losses.items()}, LOSS_TOLERANCE)
    result = Result("precision_policies")
    result.count(times)
    print(f"{args.ranks} ranks, {args.layers} layers, {args.tokens} tokens each, full fine-tuning")
    print(f"{'policy':20}{'s a step':>10}{'fp32 / it':>11}{'peak MiB':>10}{'first loss':>12}{'last loss':>11}")

    def last(name: str) -> float:
        """Mean over one round of the documents."""
        return sum(losses[name][-NUM_DOCUMENTS:]) / NUM_DOCUMENTS

    for name in args.policies:
        row = {
            "policy": name,
            "step_seconds": times.median(name),
            "speedup": times.ratio("fp32", name).median,
            "first_loss": losses[name][0],
            "last_loss": last(name),
            "loss_above_fp32": last(name) / last("fp32") - 1,
        }
        if not args.skip_memory:
            row["peak_mib"] = max(run_ranks(args.ranks, hold, (args, name), RETURNING))
        result.rows.append(row)
        memory = "" if args.skip_memory else f"{row['peak_mib']:.0f}"
        print(
            f"{name:20}{row['step_seconds']:10.3f}{row['speedup']:10.2f}x{memory:>10}{row['first_loss']:12.4f}"
            f"{row['last_loss']:11.4f}"
        )
    result.values = {"speedup": {row["policy"]: row["speedup"] for row in result.rows}}
    finish(args, result, draw)


if __name__ == "__main__":
    main()
