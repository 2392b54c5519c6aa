"""Cases of `ops_cuda`: NF4, and products with it. Peers: bitsandbytes where it is installed, and products in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cuda_case import BF16, Case, Maker, Run, check_all_close, check_equal
from torch import Tensor

from minift.ops.nf4 import Nf4, dequantize_nf4, quantize_nf4, quantize_scales
from minift.ops.nf4_linear import nf4_linear, nf4_linear_dx

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

# Of the norm of a weight: their CUDA kernels round scales to the nearest map value, and ours as their CPU kernels do.
BITSANDBYTES_DIFFERS = 0.02


def nf4(make: Maker) -> Iterator[Case]:
    """There and back. Oracle: the CPU's kernels, which tests hold to bitsandbytes bit for bit."""
    n = make.sizes.matrix[0] * make.sizes.matrix[1]
    code_bytes, scale_bytes, nested_bytes = n / 2, n / 16, n / 64 * (1 + 4 / 256)
    weight = make.turns(lambda: make.random(*make.sizes.matrix, scale=0.02), 2 * n)
    pairs = make.turns(lambda: (quantized(weight()), torch.empty_like(weight())), 2.5 * n)

    def dequantize() -> Tensor:
        matrix, out = pairs()
        return dequantize_nf4(matrix, BF16, out=out)

    def check_dequantize() -> None:
        one = weight()
        matrix, theirs = quantized(one), bnb_quantized(one)
        ours = dequantize_nf4(matrix, BF16).view_as(one)
        check_equal("dequantize", dequantize_nf4(on_cpu(matrix), BF16).view_as(one), ours)
        if theirs is not None:
            distance = ((bnb.dequantize_4bit(*theirs) - ours).float().norm() / ours.float().norm()).item()
            if distance > BITSANDBYTES_DIFFERS:
                raise ValueError(f"dequantize: {distance:.1e} from bitsandbytes, above {BITSANDBYTES_DIFFERS:.1e}")

    def check_quantize() -> None:
        one = weight()
        for expected, actual in zip(quantize_nf4(one.cpu()), quantize_nf4(one), strict=True):
            check_equal("quantize", expected, actual)

    def peers(run: Run) -> dict[str, Run]:
        return {} if bnb is None else {"bitsandbytes": run}

    their_pairs = None if bnb is None else make.turns(lambda: bnb_quantized(weight()), 2.5 * n)
    yield Case(
        "NF4 dequantize, nested", dequantize, check_dequantize, code_bytes + nested_bytes + 2 * n,
        others=peers(lambda: bnb.dequantize_4bit(*their_pairs())),
    )  # fmt: skip
    yield Case(
        "NF4 quantize", lambda: torch.ops.minift.nf4_quantize(weight(), 64), check_quantize,
        2 * n + code_bytes + scale_bytes, others=peers(lambda: bnb_quantized(weight(), nested=False)),
    )  # fmt: skip
    yield Case(
        "NF4 quantize, nested and checked", lambda: quantized(weight()), check_quantize,
        2 * n + code_bytes + nested_bytes, others=peers(lambda: bnb_quantized(weight())),
    )  # fmt: skip


def nf4_products(make: Maker) -> Iterator[Case]:
    """A few tokens, where the time is that of reading codes, and many."""
    out_features, in_features = make.sizes.matrix
    n = out_features * in_features
    dense = make.turns(lambda: make.random(out_features, in_features, scale=0.02), 2 * n)
    matrix = make.turns(lambda: quantized(dense()), n / 2)
    one, scratch = matrix(), torch.empty_like(dense())

    def by_mm(x: Tensor, one: Nf4, transposed: bool = True) -> Tensor:
        dequantize_nf4(one, BF16, out=scratch)
        return torch.mm(x, scratch.t() if transposed else scratch)

    for tokens in make.sizes.few:
        x = make.random(tokens, in_features)
        yield Case(
            f"nf4_gemv, {tokens} tokens",
            lambda x=x: nf4_linear(x, matrix()),
            lambda x=x: check_all_close("nf4_gemv", by_mm(x, one), nf4_linear(x, one)),
            n / 2 + n / 64 + 2 * tokens * (in_features + out_features),
            others={
                "dequantize + mm": lambda x=x: by_mm(x, matrix()),
                "bf16 mm": lambda x=x: torch.mm(x, dense().t()),
            },
        )
    for tokens in make.sizes.many:
        x = make.random(tokens, in_features)
        yield Case(
            f"nf4_linear, {tokens} tokens",
            lambda x=x: nf4_linear(x, matrix()),
            lambda x=x: check_all_close("nf4_linear", by_mm(x, one), nf4_linear(x, one)),
            flops=2 * tokens * n,
            others={"bf16 mm": lambda x=x: torch.mm(x, dense().t())},
        )
    dy = make.random(tokens, out_features)
    yield Case(
        f"nf4_linear_dx, {tokens} tokens",
        lambda: nf4_linear_dx(dy, matrix()),
        lambda: check_all_close("dx", by_mm(dy, one, transposed=False), nf4_linear_dx(dy, one)),
        flops=2 * tokens * n,
        others={"bf16 mm": lambda: torch.mm(dy, dense())},
    )


def quantized(weight: Tensor) -> Nf4:
    codes, absmax = quantize_nf4(weight)
    scales, nested_absmax, offset = quantize_scales(absmax)
    return Nf4(codes=codes, scales=scales, nested_absmax=nested_absmax, offset=offset, shape=tuple(weight.shape))


def bnb_quantized(weight: Tensor, nested: bool = True) -> tuple | None:
    """Codes and state; None without bitsandbytes."""
    return None if bnb is None else bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)


def on_cpu(nf4: Nf4) -> Nf4:
    parts = {name: getattr(nf4, name).cpu() for name in ("codes", "scales", "nested_absmax", "offset")}
    return Nf4(**parts, shape=nf4.shape)
