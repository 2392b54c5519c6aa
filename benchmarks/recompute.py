"""What does each recompute policy cost in time and save in memory?

    python benchmarks/recompute.py                      # LoRA r=16 with dropout, SmolLM2-135M shapes, 512 tokens
    python benchmarks/recompute.py --method full

All policies live in one process and take steps in turns, after their losses over the first steps, drawn from equal
generators, were found equal to the bit. Memory comes from a fresh process per policy: *kept* is what is resident more
after a forward than before it, *peak* the most during a step less what is resident between steps. The picture is the
frontier: nobody should use a policy that lies above and to the right of another.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from processes import KEEPING, RETURNING, PeakResident, resident_bytes, run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import Trainee, random_batch

from minift.dist.process import World
from minift.peft.lora import LoraConfig
from minift.recompute import RecomputeConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

POLICIES = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig("selective"),
    "full, every 4th": RecomputeConfig("full", every=4),
    "full, every 2nd": RecomputeConfig("full", every=2),
    "full": RecomputeConfig("full"),
}  # not offload: on a CPU that is full
CHECK_STEPS = 3


def make(world: World, args: argparse.Namespace, name: str) -> Trainee:
    adapter = LoraConfig(r=16, alpha=32.0, dropout=0.05) if args.method == "lora" else None
    return Trainee(world, args.layers, recompute=POLICIES[name], adapter=adapter)


def step(trainee: Trainee, args: argparse.Namespace, number: int) -> float:
    torch.manual_seed(number)  # the same dropout for all
    return trainee.step([random_batch(args.tokens + 1, number)])


def time_policies(world: World, tell: object, args: argparse.Namespace) -> Times:
    trainees = {name: make(world, args, name) for name in POLICIES}
    losses = {name: [step(t, args, n) for n in range(CHECK_STEPS)] for name, t in trainees.items()}
    check_losses(losses, 0.0)

    def turn(trainee: Trainee) -> Turn:
        numbers = itertools.count(CHECK_STEPS)
        return stopwatch(lambda: step(trainee, args, next(numbers)))

    return take_turns({name: turn(trainee) for name, trainee in trainees.items()}, args.rounds)


def hold(world: World, tell: object, job: tuple[argparse.Namespace, str]) -> dict[str, float]:
    """MiB that a step of one policy takes, and that its forward keeps."""
    args, name = job
    trainee = make(world, args, name)
    for number in range(2):
        step(trainee, args, number)
    before = resident_bytes()
    loss_sum = trainee.objective(trainee.model, random_batch(args.tokens + 1, 2)).loss_sum
    kept = resident_bytes() - before
    (loss_sum / args.tokens).backward()
    trainee.engine.clear_gradients()
    peak = PeakResident()
    for number in range(3, 6):
        step(trainee, args, number)
    return {"kept_mib": kept / 2**20, "peak_mib": (peak.bytes() - peak.held_bytes) / 2**20}


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Memory against time, of each method."""
    runs = [run for run in runs if "kept_mib" in run["rows"][0]]
    figure.set_size_inches(5.6 * len(runs), 3.6)
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        best, least = [], math.inf
        for row in sorted(run["rows"], key=lambda row: row["time"]):
            if row["kept_mib"] < least:
                best, least = [*best, row], row["kept_mib"]
        axes.plot([r["time"] for r in best], [r["kept_mib"] for r in best], color=theme.quiet, linestyle=":")
        for row in run["rows"]:
            axes.plot(row["time"], row["kept_mib"], color=theme.ours, marker="o", markersize=7)
            place = {"xytext": (7, 5), "textcoords": "offset points"}
            axes.annotate(row["policy"], (row["time"], row["kept_mib"]), **place)
        axes.set_title({"lora": "LoRA", "full": "full fine-tuning"}[run["parameters"]["method"]])
        axes.set(xlabel="time of a step, relative to none", ylabel="MiB kept for backward", ylim=(0, None))
        axes.margins(x=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-memory", action="store_true")
    args = parse(parser)

    (times,) = run_ranks(1, time_policies, args, KEEPING)
    result = Result("recompute")
    result.count(times)
    print(f"{args.method}, {args.layers} layers, {args.tokens} tokens, bf16, one thread")
    print(f"{'policy':18}{'s a step':>10}{'to none':>9}{'kept, MiB':>11}{'peak, MiB':>11}")
    for name in POLICIES:
        row = {"policy": name, "step_seconds": times.median(name), "time": times.ratio(name, "none").median}
        if not args.skip_memory:
            row |= run_ranks(1, hold, (args, name), RETURNING)[0]
        result.rows.append(row)
        memory = "" if args.skip_memory else f"{row['kept_mib']:11.0f}{row['peak_mib']:11.0f}"
        print(f"{name:18}{row['step_seconds']:10.3f}{row['time']:9.2f}{memory}")
    by_name = {row["policy"]: row for row in result.rows}
    result.values = {"full_time_ratio": by_name["full"]["time"], "selective_time_ratio": by_name["selective"]["time"]}
    if not args.skip_memory:
        result.values["full_kept_ratio"] = by_name["full"]["kept_mib"] / by_name["none"]["kept_mib"]
        result.values["selective_kept_ratio"] = by_name["selective"]["kept_mib"] / by_name["none"]["kept_mib"]
    finish(args, result, draw)


if __name__ == "__main__":
    main()
