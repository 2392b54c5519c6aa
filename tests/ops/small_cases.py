"""Every op that has a CUDA kernel, on shapes that fit nowhere: what `compute-sanitizer` is pointed at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.ops.small_cases

Widths are no multiple of a pack or a warp, addresses are misaligned, rows strided, blocks incomplete; sizes are small,
since a sanitizer is slow. Results are not looked at: the property tests beside this do that. Prints "ok".
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.adamw_8bit import QuantizedMoments, adamw_8bit_
from minift.ops.blockwise import dynamic_map, quantize_blockwise
from minift.ops.cross_entropy import cross_entropy_
from minift.ops.dropout import dropout
from minift.ops.low_rank import factor_gradients_, from_rank, to_rank, to_rank_and_gradients_
from minift.ops.nf4 import (
    Nf4,
    absmax_of,
    dequantize_nf4,
    dequantize_nf4_columns,
    quantize_nf4,
    quantize_scales,
)
from minift.ops.nf4_linear import nf4_linear
from minift.ops.norm import rms_norm, rms_norm_backward
from minift.ops.rope import apply_rope
from minift.ops.sgmv import sgmv_
from minift.ops.swiglu import swiglu, swiglu_backward_
from minift.ops.updated_swiglu import updated_swiglu, updated_swiglu_backward_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = AdamWStep(beta1=0.9, beta2=0.999, eps=1e-8, step_size=1e-3, keep=0.99, key=7)


def draw(device: torch.device, dtype: torch.dtype, rows: int, width: int, packed: bool = False) -> Tensor:
    """(rows, width): contiguous and aligned, or a misaligned part of wider rows."""
    if packed:
        return torch.randn(rows, width, device=device).to(dtype)
    return torch.randn(rows, width + 5, device=device).to(dtype)[:, 3 : 3 + width]


def rows_cases(device: torch.device) -> None:
    for dtype, (rows, width), packed in itertools.product(DTYPES, ((3, 37), (5, 264), (0, 8)), (True, False)):
        x, dy = (draw(device, dtype, rows, width, packed) for _ in range(2))
        weight = draw(device, dtype, 1, width, packed)[0]
        _, rstd = rms_norm(x, weight, 1e-5)
        for trains, dresidual in itertools.product((True, False), (None, x)):
            rms_norm_backward(dy, x, weight, rstd, dresidual, trains)
        gate, up = (tensor.detach().requires_grad_() for tensor in (x, dy))
        swiglu(gate, up).backward(dy)
        for need_y in (False, True):
            swiglu_backward_(dy.contiguous(), gate.detach(), up.detach(), need_y)
        dropout(x, seed=-3, num_dropped=20000)
        logits = torch.randn(rows, width, device=device).to(dtype)
        for need_gradient in (True, False):
            cross_entropy_(logits, torch.arange(rows, device=device), need_gradient)
    for dtype, head_dim in itertools.product(DTYPES, (6, 128)):
        heads = draw(device, dtype, 5, 3 * head_dim).view(5, 3, head_dim).requires_grad_()
        angle = torch.rand(5, head_dim // 2, device=device)
        apply_rope(heads, angle.cos(), angle.sin()).sum().backward()


def nf4_cases(device: torch.device) -> None:
    for dtype, (features, width), block_size in itertools.product(DTYPES, ((5, 64), (7, 4096), (1, 77)), (32, 64)):
        weight = torch.randn(features * width + 1, device=device).to(dtype)[1:].view(features, width)
        codes, absmax = quantize_nf4(weight, block_size)
        absmax_of(weight, block_size)
        scales, nested_absmax, offset = quantize_scales(absmax)
        nested = {"scales": scales, "nested_absmax": nested_absmax, "offset": offset}
        for kind, address in itertools.product(({"absmax": absmax}, nested), (0, 1, 8)):
            codes = torch.cat([codes.new_empty(address), codes[-((features * width + 1) // 2) :]])[address:]
            nf4 = Nf4(codes=codes, shape=(features, width), block_size=block_size, **kind)
            dequantize_nf4(nf4, dtype, out=torch.empty(weight.numel() + 1, dtype=dtype, device=device)[1:])
            for tokens in (1, 3, 16):
                nf4_linear(draw(device, dtype, tokens, width), nf4)
            if width % block_size == 0:
                dequantize_nf4_columns(nf4, 0, torch.empty(features, block_size, dtype=dtype, device=device))


def low_rank_cases(device: torch.device) -> None:
    dtype = torch.bfloat16
    for tokens, packed, ranks in itertools.product((1, 70, 300), (True, False), ((3, 16, 9), (8, 8))):
        widths = [40 + 61 * i for i in range(len(ranks))]
        wides = [draw(device, dtype, tokens, width, packed) for width in widths]
        factors = [draw(device, dtype, width, rank, packed) for width, rank in zip(widths, ranks, strict=True)]
        narrow = to_rank(wides, factors, [0.5] * len(ranks))
        narrows = list(narrow.split(list(ranks), dim=1))
        from_rank(narrows, factors, [1] * len(ranks), [None, *(f[:, 0] for f in factors[1:])])
        for gradient_dtype in DTYPES:
            gradients = [torch.empty(f.shape, dtype=gradient_dtype, device=device) for f in factors]
            factor_gradients_(gradients, wides, narrows)
        of_one = [factors[0], draw(device, dtype, widths[0], ranks[1]).t().contiguous().t()]
        to_rank(wides[:1], of_one, [1.0, 2.0])
        from_rank(narrows[:2], of_one, [2], [None])
        factor_gradients_([torch.empty_like(f) for f in of_one], wides[:1], narrows[:2])
        gradients = [torch.empty(f.shape, device=device) for f in of_one]
        to_rank_and_gradients_(wides[:1], of_one, [1.0, 2.0], narrows[:2], gradients)
    for tokens, packed, width in itertools.product((1, 130), (True, False), (8, 264)):
        gate, up, dy = (draw(device, dtype, tokens, width, packed=True) for _ in range(3))
        narrows = [draw(device, dtype, tokens, rank, packed) for rank in (8, 48, 16)]
        factors = [draw(device, dtype, width, rank, packed) for rank in (8, 48, 16)]
        updated_swiglu(gate, up, narrows[:2], factors[:2], [1, 1])
        for need_y in (False, True):
            updated_swiglu_backward_(dy, gate, up, narrows, factors, [1, 1, 1], need_y)
    for dtype, (inner, outer) in itertools.product(DTYPES, ((37, 70), (256, 64))):
        A, B = draw(device, dtype, 20, inner, packed=True), draw(device, dtype, 20, outer, packed=True)
        ranks = torch.tensor([[0, 3], [3, 19], [19, 19], [19, 20]], dtype=torch.int32)
        bounds = torch.tensor([1, 2, 9, 9, 12], dtype=torch.int32)
        choice = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
        sgmv_(draw(device, dtype, 13, outer), draw(device, dtype, 13, inner), A, B, ranks, bounds, choice)


def adamw_cases(device: torch.device) -> None:
    maps = [dynamic_map(signed).to(device) for signed in (True, False)]
    factor = torch.tensor(0.5, device=device)
    storages = (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)
    for n, (master_dtype, in_halves) in itertools.product((1, 255, 1030), storages):
        start, grad = (torch.randn(n + 1, device=device)[1:] for _ in range(2))
        lower = torch.zeros(n + 1, dtype=torch.int16, device=device)[1:] if in_halves else None
        weights = Weights(start.to(master_dtype), grad, first=3, lower=lower)
        adamw_(weights, torch.zeros_like(start), torch.zeros_like(start), factor, STEP)
        zeros = [quantize_blockwise(torch.zeros_like(start), a_map) for a_map in maps]
        adamw_8bit_(weights, QuantizedMoments(*zeros[0], *zeros[1]), *maps, None, STEP)


def run(device: torch.device) -> None:
    for cases in (rows_cases, nf4_cases, low_rank_cases, adamw_cases):
        cases(device)
        if device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    torch.manual_seed(0)
    run(torch.device(parser.parse_args().device))
    print("ok")


if __name__ == "__main__":
    main()
