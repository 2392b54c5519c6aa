"""How do minift and transformers + PEFT (+ bitsandbytes) compare in time and memory of one step of LoRA, QLoRA or full
fine-tuning?

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --methods lora --rounds 3 --skip-memory

SmolLM2-135M's shapes with random weights, two documents of 512 tokens, rank 16 on all projections, alpha 32, no dropout
(PEFT's default), AdamW over what is trained, two threads, CPU. Both sides load the same model folder and the same
adapter folder, and take steps on the same tokens; neither uses gradient checkpointing.

    lora     bf16 base. minift: built, sharded and stepped as its trainer does (fp32 masters, bf16 compute, world of
             one). PEFT: its defaults, so adapters in fp32 (`autocast_adapter_dtype`), sdpa attention, torch's fused
             AdamW.
    qlora    the same over an NF4 base with double quantization. PEFT: bitsandbytes, bf16 compute. Norms and embeddings
             stay bf16: `prepare_model_for_kbit_training` would make the model slower and larger.
    full     every weight. Both: fp32 masters, bf16 compute; transformers by autocast.

Where the processor has no arithmetic in 16 bits (AVX2 at most), torch multiplies bf16 matrices at 1 to 10 GFLOP/s and a
step of PEFT in bf16 takes minutes. There PEFT's base is loaded in fp32 (bitsandbytes: fp32 compute), which is the best
it has; minift keeps its bf16 and widens blocks of it (`minift/ops/matmul.py`). `--peft-dtype bfloat16` insists.

Equal losses first: over the first steps, each within LOSS_TOLERANCE of the other's. Both sides compute in bf16, whose
rounding (2^-9 relative) enters at other places; that is what the tolerance allows for.

Time: both sides live in one process, which keeps the memory that they let go (`KEEPING`; with glibc's defaults PEFT's
full fine-tuning takes 5.3 s a step instead of 3.7), and take steps in turns. "products" is what is left of a step if
everything but the products with the model's weights costs nothing. No faster step is possible without faster products,
so `*_step_ratio_limit`, PEFT's time over theirs, bounds the ratio.
Memory: a fresh process per side, the peak of what is resident over three steps that follow two. `held` is what is
resident between steps.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from processes import KEEPING, RETURNING, PeakResident, run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import VOCAB_SIZE
from step_sides import METHODS, SIDES, Job, Step, write_folders
from torch import Tensor

from minift.dist.process import World
from minift.style import label_bars, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

LOSS_TOLERANCE = 2e-4  # relative


def tokens_of(step: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB_SIZE, (2, length), generator=generator)


def time_steps(world: World, tell: object, job: Job) -> tuple[Times, dict[str, list[float]]]:
    """Seconds in turns, and every side's losses of the first steps, which were equal."""
    steps = {side: SIDES[side](job, world) for side in job.sides}
    losses = {
        side: [step(tokens_of(number, job.tokens)) for number in range(job.check_steps)] for side, step in steps.items()
    }
    del losses["products"]
    check_losses(losses, LOSS_TOLERANCE)

    def turn(step: Step) -> Turn:
        numbers = itertools.count(job.check_steps)
        return stopwatch(lambda: step(tokens_of(next(numbers), job.tokens)))

    return take_turns({side: turn(step) for side, step in steps.items()}, job.rounds), losses


def hold_steps(world: World, tell: object, job: Job) -> dict[str, float]:
    """MiB: the peak over three steps that follow two, and what is resident between steps."""
    (side,) = job.sides
    step = SIDES[side](job, world)
    for number in range(2):
        step(tokens_of(number, job.tokens))
    peak = PeakResident()
    for number in range(2, 5):
        step(tokens_of(number, job.tokens))
    return {"peak": peak.bytes() / 2**20, "held": peak.held_bytes / 2**20}


def default_peft_dtype() -> str:
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Seconds and memory of both sides, by method: the newest of each."""
    values = {key: value for run in runs for key, value in run["values"].items()}
    methods = [method for method in METHODS if f"{method}_step_seconds" in values]
    figure.set_size_inches(9, 0.9 + 0.75 * len(methods))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, numbers in (
        (left, "seconds a step", [values[f"{method}_step_seconds"] for method in methods]),
        (right, "peak MiB", [values.get(f"{method}_memory_mib", {}) for method in methods]),
    ):
        axes.set_title(title)
        for offset, side, label, colour in (
            (-0.2, "minift", "minift", theme.ours),
            (0.2, "peft", "transformers, PEFT, bitsandbytes", theme.theirs),
        ):
            found = [number.get(f"{side} {method}", 0) for method, number in zip(methods, numbers, strict=True)]
            heights = [number["peak"] if isinstance(number, dict) else number for number in found]
            places = [place + offset for place in range(len(methods))]
            bars = axes.barh(places, heights, 0.38, color=colour, label=label)
            label_bars(axes, bars, [three_digits(height) for height in heights])
    for place, method in enumerate(methods):
        limit = values[f"{method}_step_seconds"]["products"]
        left.plot([limit, limit], [place - 0.42, place + 0.42], color=theme.ink, linewidth=1.5)
    left.plot([], [], color=theme.ink, linewidth=1.5, label="matrix products alone")
    left.set_yticks(range(len(methods)), [{"lora": "LoRA", "qlora": "QLoRA"}.get(m, m) for m in methods])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check-steps", type=int, default=4)
    parser.add_argument("--peft-dtype", choices=("bfloat16", "float32"), default=default_peft_dtype())
    parser.add_argument("--skip-memory", action="store_true")
    args = parse(parser)

    result = Result("lora_step")
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder), args.layers)
        for method in args.methods:
            job = Job(folder, method, tuple(SIDES), args.layers, args.tokens, args.check_steps, args.rounds,
                      args.peft_dtype)  # fmt: skip
            times, losses = run_ranks(1, time_steps, job, KEEPING, num_threads=2)[0]
            result.count(times)
            for side in SIDES:
                print(f"{side:9}{method:7}{times.median(side):8.3f} s a step (fastest {times.fastest(side):.3f})")
            result.values |= {
                f"{method}_step_ratio": times.ratio("peft", "minift").median,
                f"{method}_step_ratio_limit": times.ratio("peft", "products").median,
                f"{method}_losses": {f"{side} {method}": values for side, values in losses.items()},
                f"{method}_step_seconds": {
                    side if side == "products" else f"{side} {method}": times.median(side) for side in SIDES
                },
            }
            if args.skip_memory:
                continue
            mib = {
                side: run_ranks(1, hold_steps, replace(job, sides=(side,)), RETURNING, num_threads=2)[0]
                for side in ("minift", "peft")
            }
            for side, found in mib.items():
                print(f"{side:9}{method:7}peak {found['peak']:6.0f} MiB, held {found['held']:6.0f} MiB")
            result.values |= {
                f"{method}_memory_ratio": mib["minift"]["peak"] / mib["peft"]["peak"],
                f"{method}_memory_mib": {f"{side} {method}": found for side, found in mib.items()},
            }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
