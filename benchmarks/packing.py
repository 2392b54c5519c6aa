"""What does packing gain over padding?

    python benchmarks/packing.py                        # LoRA r=16, SmolLM2-135M shapes, 8 documents a step

The same documents, of lengths as a log-normal distribution gives them (instructions and answers are like that), in
one microbatch: *packed* end to end; *padded* each to the longest of the microbatch; *padded to the limit* each to the
longest that the run allows, which is what fixed shapes cost. Padding is tokens without a target at the end of a
document: they change nothing but the time. All three go through the same model and must give the same losses. Real
tokens per second count the documents' own tokens.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from processes import run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import Trainee, random_document

from minift.data.batch import Batch, pack
from minift.data.documents import Encoded
from minift.dist.process import World
from minift.peft.lora import LoraConfig
from minift.style import label_bars, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

CHECK_STEPS = 2
LOSS_TOLERANCE = 2e-4  # bf16 products of other shapes, so sums in another order


def documents_of(args: argparse.Namespace, step: int) -> list[Encoded]:
    generator = np.random.default_rng(step)
    lengths = generator.lognormal(np.log(args.median_tokens), args.sigma, args.documents).round().astype(int)
    lengths = lengths.clip(8, args.longest_tokens)
    return [random_document(length, 1000 * step + number) for number, length in enumerate(lengths)]


def padded(documents: list[Encoded], length: int) -> Batch:
    def pad(document: Encoded) -> Encoded:
        missing = length - len(document.tokens)
        return Encoded(np.pad(document.tokens, (0, missing)), np.pad(document.targets_mask, (0, missing)))

    return pack([pad(document) for document in documents])


MAKERS: dict[str, Callable[[list[Encoded], argparse.Namespace], Batch]] = {
    "packed": lambda documents, args: pack(documents),
    "padded": lambda documents, args: padded(documents, max(len(document.tokens) for document in documents)),
    "padded to the limit": lambda documents, args: padded(documents, args.longest_tokens),
}


def time_batches(world: World, tell: object, args: argparse.Namespace) -> Times:
    trainees = {name: Trainee(world, args.layers, adapter=LoraConfig(r=16, alpha=32.0)) for name in MAKERS}

    def step(name: str, number: int) -> float:
        return trainees[name].step([MAKERS[name](documents_of(args, number), args)])

    check_losses({name: [step(name, number) for number in range(CHECK_STEPS)] for name in MAKERS}, LOSS_TOLERANCE)

    def turn(name: str) -> Turn:
        numbers = itertools.count(CHECK_STEPS)
        return stopwatch(lambda: step(name, next(numbers)))

    return take_turns({name: turn(name) for name in MAKERS}, args.rounds)


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 1.9)
    names = [row["batch"] for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    speeds = [row["real_tokens_per_second"] for row in rows]
    shares = [100 * row["real_share"] for row in rows]
    colours = [theme.ours if name == "packed" else theme.theirs for name in names]
    label_bars(left, left.barh(names, speeds, color=colours), [three_digits(speed) for speed in speeds])
    label_bars(right, right.barh(names, shares, color=colours), [f"{share:.0f} %" for share in shares])
    left.set_title("real tokens per second")
    right.set_title("real tokens among all")
    left.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8, help="per step")
    parser.add_argument("--median-tokens", type=int, default=120, help="median length of a document")
    parser.add_argument("--sigma", type=float, default=0.6, help="of the logarithm of the length")
    parser.add_argument("--longest-tokens", type=int, default=512, help="longest that the run allows")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)

    (times,) = run_ranks(1, time_batches, args, num_threads=2)
    counted = [documents_of(args, CHECK_STEPS + number) for number in times.counted_rounds()]
    real = [sum(len(document.tokens) for document in documents) for documents in counted]
    result = Result("packing")
    result.count(times)
    print(f"LoRA, {args.layers} layers, {args.documents} documents of about {args.median_tokens} tokens, two threads")
    print(f"{'batch':22}{'tokens':>8}{'real':>7}{'s a step':>10}{'real tokens/s':>15}{'packed is':>11}")
    for name, make in MAKERS.items():
        computed = [make(documents, args).num_tokens for documents in counted]
        row = {
            "batch": name,
            "tokens": sum(computed) / len(computed),
            "real_share": sum(real) / sum(computed),
            "step_seconds": times.median(name),
            "real_tokens_per_second": sum(real) / sum(times.counted(name)),
            "packed_speedup": times.ratio(name, "packed").median,
        }
        result.rows.append(row)
        print(
            f"{name:22}{row['tokens']:8.0f}{row['real_share']:7.0%}{row['step_seconds']:10.3f}"
            f"{row['real_tokens_per_second']:15.0f}{row['packed_speedup']:10.2f}x"
        )
    speedups = {row["batch"]: row["packed_speedup"] for row in result.rows}
    result.values = {"speedup_over_padded": speedups["padded"], "speedup_over_limit": speedups["padded to the limit"]}
    finish(args, result, draw)


if __name__ == "__main__":
    main()
