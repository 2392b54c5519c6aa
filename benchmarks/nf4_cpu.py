"""How much faster are minift's NF4 kernels on the CPU than those of bitsandbytes?

    python benchmarks/nf4_cpu.py                        # a 4096 x 4096 bf16 weight, one thread
    python benchmarks/nf4_cpu.py --double-quant --threads 2

Each case first checks that both sides agree: codes, scales and dequantised weights to the bit, products to rounding.
Then both are timed in turns (a ratio above 1: minift is faster). What is compared:

    quantize             bitsandbytes.functional.quantize_4bit with quantize_nf4
    dequantize           dequantize_4bit, which always returns new memory, with dequantize_nf4 into a buffer, as
                         nf4_linear uses it; "new memory": both return new memory; "same memory": their kernel (which
                         takes fp32 scales) called directly, both into a buffer
    linear               matmul_4bit with nf4_linear; "dense" is F.linear on the bf16 weight, the limit of both
    gemv                 one token: matmul_4bit on the format that is stored; "packed" is the one that bitsandbytes'
                         Linear4bit repacks its weight into for inference on processors with AVX512-BF16

Bytes moved by dequantize: codes, scales and the result once each; copy_ of the result sets the bandwidth.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib
from protocol import check_close, stopwatch, take_turns
from results import Result, finish, parse

from minift.ops import extension
from minift.ops.nf4 import Nf4, dequantize_nf4, quantize_nf4, quantize_scales
from minift.ops.nf4_linear import nf4_linear, nf4_linear_dx
from minift.style import label_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

Function = Callable[[], object]


def quantize(weight: torch.Tensor, double_quant: bool) -> Nf4:
    codes, absmax = quantize_nf4(weight)
    if not double_quant:
        return Nf4(codes=codes, absmax=absmax, shape=tuple(weight.shape))
    scales, nested_absmax, offset = quantize_scales(absmax)
    return Nf4(codes=codes, scales=scales, nested_absmax=nested_absmax, offset=offset, shape=tuple(weight.shape))


def packed_linear(weight: torch.Tensor, double_quant: bool) -> torch.nn.Module:
    """bitsandbytes' module in evaluation mode; it repacks its weight in the first forward, where it can."""
    linear = bitsandbytes.nn.Linear4bit(
        *weight.shape[::-1],
        bias=False,
        quant_type="nf4",
        compute_dtype=weight.dtype,
        compress_statistics=double_quant,
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    return linear.to("cpu").eval()


class Comparison:
    """Pairs of functions that do the same, timed in turns; a line and a row for each."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def case(self, key: str, name: str, theirs: Function, ours: Function, rounds: int) -> float:
        """The ratio becomes `values[key]`; returns the median of ours in seconds."""
        theirs(), ours()
        times = take_turns({"theirs": stopwatch(theirs), "minift": stopwatch(ours)}, rounds)
        ratio = times.ratio("theirs", "minift").median
        self.result.count(times)
        self.result.values[key] = ratio
        milliseconds = {side: times.median(side) * 1e3 for side in times.seconds}
        self.result.rows.append({"case": name, "key": key, "ratio": ratio, "milliseconds": milliseconds})
        print(f"{name:34}{milliseconds['theirs']:12.2f}{milliseconds['minift']:12.2f}{ratio:9.2f}x", flush=True)
        return milliseconds["minift"] / 1e3


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["rows"]
    figure.set_size_inches(9, 0.8 + 0.27 * len(rows))
    axes = figure.subplots()
    colours = [theme.ours if row["ratio"] >= 1 else theme.theirs for row in rows]
    axes.set_xscale("log")
    bars = axes.barh([row["case"] for row in rows], [row["ratio"] - 1 for row in rows], left=1, color=colours)
    label_bars(axes, bars, [f"{row['ratio']:.2f}×" for row in rows])
    axes.axvline(1, color=theme.ink, linewidth=1)
    axes.set_title("times as fast as the other side (log)")
    axes.invert_yaxis()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512, help="of the linear layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21, help="pairs of turns; fewer for quantize and dx")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument(
        "--instruction-set", default="best", choices=["best", "portable", "avx2", "avx512", "avx512_bf16"]
    )
    args = parse(parser)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if extension.MISSING_REASON is not None:
        raise SystemExit(f"nothing to measure: the extension is missing ({extension.MISSING_REASON})")
    torch.ops.minift.use_instruction_set(args.instruction_set)

    size, dtype = args.size, torch.bfloat16
    weight = (torch.randn(size, size) * 0.02).to(dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=args.double_quant)
    matrix = quantize(weight, args.double_quant)
    assert torch.equal(matrix.codes, codes.view(-1))
    assert torch.equal(matrix.scales if args.double_quant else matrix.absmax, state.absmax)
    dense = bnb.dequantize_4bit(codes, state)
    buffer = torch.empty_like(dense)
    assert torch.equal(dequantize_nf4(matrix, dtype, out=buffer), dense)

    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, {extension.instruction_set()}")
    print(
        f"{size} x {size} bf16, {args.threads} thread(s), {'double-quantised' if args.double_quant else 'fp32'} scales"
    )
    print(f"{'':34}{'theirs ms':>12}{'minift ms':>12}{'ratio':>10}")
    result = Result("nf4_cpu")
    case = Comparison(result).case

    case(
        "quantize_ratio",
        "quantize",
        lambda: bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=args.double_quant),
        lambda: quantize(weight, args.double_quant),
        max(3, args.rounds // 4),
    )
    case(
        "dequantize_ratio",
        "dequantize",
        lambda: bnb.dequantize_4bit(codes, state),
        lambda: dequantize_nf4(matrix, dtype, out=buffer),
        args.rounds,
    )
    case(
        "dequantize_ratio_new_memory",
        "dequantize, new memory",
        lambda: bnb.dequantize_4bit(codes, state),
        lambda: dequantize_nf4(matrix, dtype),
        args.rounds,
    )
    absmax = state.absmax
    if args.double_quant:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    their_buffer = torch.empty_like(buffer)
    their_arguments = [bnb.get_ptr(tensor) for tensor in (codes, absmax, their_buffer)]
    their_arguments += [ctypes.c_longlong(number) for number in (64, size, size)]
    case(
        "dequantize_ratio_same_memory",
        "dequantize, same memory",
        lambda: lib.cdequantize_blockwise_cpu_nf4_bf16(*their_arguments),
        lambda: dequantize_nf4(matrix, dtype, out=buffer),
        args.rounds,
    )
    scale_bytes = size * size // 64 * (1 if args.double_quant else 4)
    moved_bytes = size * size // 2 + scale_bytes + 2 * size * size
    our_time = case(
        "copy_ratio",
        "copy of the result, for bandwidth",
        lambda: buffer.copy_(dense),
        lambda: dequantize_nf4(matrix, dtype, out=buffer),
        args.rounds,
    )
    result.values["dequantize_fraction_of_copy"] = result.values["copy_ratio"] * moved_bytes / (4 * size * size)
    result.values["dequantize_gb_per_s"] = moved_bytes / our_time / 1e9

    # Products of weights rounded to bf16 at most twice.
    tolerance = 4 * torch.finfo(dtype).eps
    for tokens, key, name in ((args.tokens, f"linear_ratio_T{args.tokens}", "linear"), (1, "gemv_ratio", "gemv")):
        x = torch.randn(tokens, size).to(dtype)
        packed = packed_linear(weight, args.double_quant)
        others: dict[str, Function] = {
            "": lambda x=x: bitsandbytes.matmul_4bit(x, codes, state),
            "packed": lambda x=x, packed=packed: packed(x),
            "dense": lambda x=x: torch.nn.functional.linear(x, dense),
        }
        for kind, theirs in others.items():
            check_close(f"{name} {kind}", theirs(), nf4_linear(x, matrix), tolerance)
            suffix, title = (f"_{kind}", f", {kind}") if kind else ("", "")
            our_time = case(
                f"{key}{suffix}",
                f"{name}, T = {tokens}{title}",
                theirs,
                lambda x=x: nf4_linear(x, matrix),
                args.rounds,
            )
        print(f"{'':34}{2 * tokens * size * size / our_time / 1e9:36.0f} GFLOP/s")

    dy = torch.randn(args.tokens, size).to(dtype)
    check_close("dx", torch.mm(dy, dense), nf4_linear_dx(dy, matrix), tolerance)
    case(
        f"linear_dx_ratio_T{args.tokens}",
        f"input gradient, T = {args.tokens}",
        lambda: torch.matmul(dy, bnb.dequantize_4bit(codes, state)),
        lambda: nf4_linear_dx(dy, matrix),
        max(3, args.rounds // 7),  # 20 s each of theirs on a processor without arithmetic in 16 bits
    )
    finish(args, result, draw)


if __name__ == "__main__":
    main()
