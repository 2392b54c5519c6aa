"""How much faster are minift's NF4 kernels on the CPU than those of bitsandbytes?

    python benchmarks/nf4_cpu.py                        # a 4096 x 4096 bf16 weight, one thread
    python benchmarks/nf4_cpu.py --double-quant --threads 2

Each case first checks that both sides agree: codes, scales and dequantised weights to the bit, products to rounding.
Then both are timed in turns, so that other load on the machine meets both; a ratio is the median over the pairs
(above 1: minift is faster). What is compared:

    quantize             bitsandbytes.functional.quantize_4bit with quantize_nf4
    dequantize           dequantize_4bit, which always returns new memory, with dequantize_nf4 into a buffer, as
                         nf4_linear uses it; "new memory": both return new memory; "same memory": their kernel (which
                         takes fp32 scales) called directly, both into a buffer
    linear               matmul_4bit with nf4_linear; "dense" is F.linear on the bf16 weight, the limit of both
    gemv                 one token: matmul_4bit on the format that is stored; "packed" is the one that bitsandbytes'
                         Linear4bit repacks its weight into for inference on processors with AVX512-BF16

Bytes moved by dequantize: codes, scales and the result once each; copy_ of the result sets the bandwidth. Prints a
table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib

from minift.ops import extension
from minift.ops.nf4 import Nf4, dequantize_nf4, quantize_nf4, quantize_scales
from minift.ops.nf4_linear import nf4_linear, nf4_linear_dx

Function = Callable[[], object]


def seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name: str, theirs: Function, ours: Function, rounds: int) -> tuple[float, float]:
    """Median of the ratio theirs / ours over pairs of turns, and the median of ours in seconds; prints a line."""
    theirs(), ours()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    their_time, our_time = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{name:34}{their_time * 1e3:12.2f}{our_time * 1e3:12.2f}{ratio:9.2f}x", flush=True)
    return ratio, our_time


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


def check_close(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Products of weights rounded to bf16 at most twice, relative to the largest."""
    error = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max()
    assert error < 4 * torch.finfo(ours.dtype).eps, f"{name}: relative error {error:.1e}"


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
    args = parser.parse_args()
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
    result = {}

    def case(key: str, name: str, theirs: Function, ours: Function, rounds: int = args.rounds) -> float:
        result[key], our_time = measure(name, theirs, ours, rounds)
        return our_time

    case(
        "quantize_ratio",
        "quantize",
        lambda: bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=args.double_quant),
        lambda: quantize(weight, args.double_quant),
        args.rounds // 4,
    )

    case(
        "dequantize_ratio",
        "dequantize",
        lambda: bnb.dequantize_4bit(codes, state),
        lambda: dequantize_nf4(matrix, dtype, out=buffer),
    )
    case(
        "dequantize_ratio_new_memory",
        "dequantize, new memory",
        lambda: bnb.dequantize_4bit(codes, state),
        lambda: dequantize_nf4(matrix, dtype),
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
    )
    scale_bytes = size * size // 64 * (1 if args.double_quant else 4)
    moved_bytes = size * size // 2 + scale_bytes + 2 * size * size
    ratio, our_time = measure(
        "copy of the result, for bandwidth",
        lambda: buffer.copy_(dense),
        lambda: dequantize_nf4(matrix, dtype, out=buffer),
        args.rounds,
    )
    result["dequantize_fraction_of_copy"] = ratio * moved_bytes / (4 * size * size)
    result["dequantize_gb_per_s"] = moved_bytes / our_time / 1e9

    for tokens, key, name in ((args.tokens, f"linear_ratio_T{args.tokens}", "linear"), (1, "gemv_ratio", "gemv")):
        x = torch.randn(tokens, size).to(dtype)
        packed = packed_linear(weight, args.double_quant)
        check_close(name, bitsandbytes.matmul_4bit(x, codes, state), nf4_linear(x, matrix))
        check_close(name, packed(x), nf4_linear(x, matrix))

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            return nf4_linear(x, matrix)

        case(key, f"{name}, T = {tokens}", lambda x=x: bitsandbytes.matmul_4bit(x, codes, state), ours)
        case(f"{key}_packed", f"{name}, T = {tokens}, packed", lambda x=x, packed=packed: packed(x), ours)
        our_time = case(
            f"{key}_dense", f"{name}, T = {tokens}, dense", lambda x=x: torch.nn.functional.linear(x, dense), ours
        )
        print(f"{'':34}{2 * tokens * size * size / our_time / 1e9:36.0f} GFLOP/s")

    dy = torch.randn(args.tokens, size).to(dtype)
    check_close("dx", torch.mm(dy, dense), nf4_linear_dx(dy, matrix))
    case(
        f"linear_dx_ratio_T{args.tokens}",
        f"input gradient, T = {args.tokens}",
        lambda: torch.matmul(dy, bnb.dequantize_4bit(codes, state)),
        lambda: nf4_linear_dx(dy, matrix),
        args.rounds // 7,  # 20 s each of theirs on a processor without arithmetic in 16 bits
    )
    settings = vars(args) | {"instruction_set": extension.instruction_set(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "nf4_cpu", **settings, **{key: round(value, 3) for key, value in result.items()}}))


if __name__ == "__main__":
    main()
