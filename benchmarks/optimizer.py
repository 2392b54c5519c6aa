"""How fast is an AdamW update, and what does its state weigh?

    python benchmarks/optimizer.py                          # 33.5 M weights, one thread: 0.5 to 1 GB moved per update
    python benchmarks/optimizer.py --threads 2 --rounds 15

torch.optim.AdamW(fused=True), which is PyTorch's best on a CPU, minift's AdamW with fp32 and 8-bit moments, resident
and paged, with fp32 and bf16 masters, and bitsandbytes' AdamW8bit. First all of them take the same three steps and
must end within what their number formats allow of torch; paged ones and those in halves must be equal to the bit.
Then they are timed in turns. "in halves": what is sent is the upper half of an fp32 master, as a training step has it;
"cast after": it is a bf16 copy of the master, which a cast renews after each update.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from protocol import stopwatch, take_turns
from results import Result, finish, parse
from torch import Tensor

from minift.ops import extension
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange
from minift.style import label_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

# A block's matrices and its two norms. Tensors of 2^25 fp32 numbers alone come from the C library 2^27 bytes and a page
# apart, and just there (at a multiple of 2^26, and one to three pages) a Zen 4 goes through four streams at 0.75 of its
# pace. Resident moments then look slower than paged ones, which begin a page of their own.
BLOCK_WEIGHTS = (1 << 25) + 2 * 4096
LR, DECAY = 1e-3, 0.01
EQUAL_STEPS = 3


@dataclass(frozen=True)
class Variant:
    """step: one update. weights: gives what it updates. bound: how far from torch's, relative to the way gone."""

    name: str
    step: Callable[[], object]
    weights: Callable[[], Tensor]
    state_bytes: int
    bound: float


def minift_variant(
    name: str, start: Tensor, grad: Tensor, master: torch.dtype, bound: float, is_cast: bool = False, **config
) -> Variant:
    """In halves, if the name says so. is_cast: to a bf16 copy after each update."""
    n = len(start)
    lower = torch.zeros(n, dtype=torch.int16) if name.endswith("in halves") else None
    shard = FlatShard("all", torch.empty(n, dtype=master), grad, [ParamRange("w", 0, n, 0, (n,))], lower)
    shard.set_weights(start)
    copy = torch.zeros(n, dtype=torch.bfloat16)
    optimizer = AdamW([shard], OptimConfig(lr=LR, weight_decay=DECAY, no_decay=(), **config))
    state_bytes = sum(tensor.nbytes for tensor in optimizer.state_dict()["all"].values())

    def step() -> None:
        optimizer.step(1.0, grad_factor=0.5)
        if is_cast:
            copy.copy_(shard.master)

    return Variant(name, step, shard.weights, state_bytes, bound)


def other_variant(name: str, start: Tensor, grad: Tensor, bound: float, make: Callable, state_bytes: int) -> Variant:
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = grad * 0.5
    optimizer = make([parameter], lr=LR, weight_decay=DECAY)
    return Variant(name, optimizer.step, lambda: parameter.data, state_bytes, bound)


def make_variants(n: int) -> list[Variant]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator).bfloat16().float()  # so that bf16 masters begin with the same weights
    grad = torch.randn(n, generator=generator) * 1e-3
    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        other_variant("torch fused", start, grad, 0.0, lambda *a, **k: torch.optim.AdamW(*a, **k, fused=True), 8 * n),
        minift_variant("fp32", start, grad, fp32, 1e-3, state="fp32"),
        minift_variant("fp32, paged", start, grad, fp32, 1e-3, state="fp32", paged=True),
        minift_variant("fp32, in halves", start, grad, bf16, 1e-3, state="fp32"),
        minift_variant("fp32, cast after", start, grad, fp32, 1e-3, is_cast=True, state="fp32"),
        # One rounding is at most 2^-7 of a weight; three updates move it by 0.003.
        minift_variant("fp32, bf16 master", start, grad, bf16, 3.0, state="fp32"),
        minift_variant("8bit", start, grad, fp32, 0.05, state="8bit"),
        minift_variant("8bit, paged", start, grad, fp32, 0.05, state="8bit", paged=True),
        minift_variant("8bit, in halves", start, grad, bf16, 0.05, state="8bit"),
        minift_variant("8bit, cast after", start, grad, fp32, 0.05, is_cast=True, state="8bit"),
        minift_variant("8bit, bf16 master", start, grad, bf16, 3.0, state="8bit"),
        other_variant("bitsandbytes 8bit", start, grad, 0.05, bitsandbytes.optim.AdamW8bit, 2 * n + 8 * (n // 256)),
    ]


def check(variants: list[Variant]) -> None:
    """The same three steps everywhere."""
    start = variants[0].weights().clone()
    for variant in variants:
        for _ in range(EQUAL_STEPS):
            variant.step()
    torchs = variants[0].weights()
    moved = (torchs - start).norm()
    assert moved > 0
    for variant in variants:
        distance = ((variant.weights().float() - torchs).norm() / moved).item()
        assert distance <= variant.bound, f"{variant.name}: {distance:.1e} of the way from torch"
    by_name = {variant.name: variant.weights for variant in variants}
    for state in ("fp32", "8bit"):
        for other in ("paged", "in halves", "cast after"):
            assert torch.equal(by_name[state](), by_name[f"{state}, {other}"]()), f"{state}, {other}"


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 0.8 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    names = [row["name"] for row in rows]
    colours = [theme.theirs if name.startswith(("torch", "bitsandbytes")) else theme.ours for name in names]
    speeds = left.barh(names, [row["gparams_per_second"] for row in rows], color=colours)
    label_bars(left, speeds, [f"{row['gparams_per_second']:.2f}" for row in rows])
    states = right.barh(names, [row["state_bytes_per_weight"] for row in rows], color=colours)
    label_bars(right, states, [f"{row['state_bytes_per_weight']:.2f}" for row in rows])
    left.set_title("weights updated per second, 10⁹")
    right.set_title("bytes of state a weight")
    left.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=BLOCK_WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parse(parser)

    torch.set_num_threads(args.threads)
    variants = make_variants(args.weights)
    check(variants)
    times = take_turns({variant.name: stopwatch(variant.step) for variant in variants}, args.rounds)

    print(f"torch {torch.__version__}, {extension.instruction_set()}, {args.threads} thread(s), {args.weights} weights")
    print(f"{'AdamW':22}{'ms':>8}{'Gweights/s':>12}{'to torch':>10}{'state B':>9}")
    result = Result("optimizer")
    result.count(times)
    for variant in variants:
        seconds = times.median(variant.name)
        row = {
            "name": variant.name,
            "seconds": seconds,
            "gparams_per_second": args.weights / seconds / 1e9,
            "speedup": times.ratio("torch fused", variant.name).median,
            "state_bytes_per_weight": variant.state_bytes / args.weights,
        }
        result.rows.append(row)
        print(
            f"{variant.name:22}{seconds * 1e3:8.0f}{row['gparams_per_second']:12.2f}{row['speedup']:9.2f}x"
            f"{row['state_bytes_per_weight']:9.2f}"
        )
    result.values = {
        name: times.ratio(slow, fast).median
        for name, slow, fast in (
            ("torch_fused_over_fp32", "torch fused", "fp32"),
            ("bitsandbytes_over_8bit", "bitsandbytes 8bit", "8bit"),
            ("cast_after_over_in_halves_fp32", "fp32, cast after", "fp32, in halves"),
            ("cast_after_over_in_halves_8bit", "8bit, cast after", "8bit, in halves"),
            ("paged_over_resident_fp32", "fp32, paged", "fp32"),
            ("paged_over_resident_8bit", "8bit, paged", "8bit"),
        )
    }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
