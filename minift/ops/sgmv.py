"""Segmented low-rank product: every stretch of tokens is updated by an adapter of its own, in one call.

    y_s += (x_s A_aᵀ) B_a        for the tokens of segment s, with the adapter a = choice[s]

The factors of all adapters stand on top of each other, so ranks may differ, and an adapter of rank 0 changes nothing.
Chen et al. 2023 (Punica), arXiv 2310.18547, section 4, call it SGMV. For inference, so it is not differentiable: the
compiled kernels read a weight once for four tokens and keep x Aᵀ in fp32; y is rounded once. The numbers of segments
stay on the host for a GPU too: its kernels take them as an argument, and nobody waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops import extension


@torch.no_grad()
def sgmv_(
    y_TO: Tensor, x_TI: Tensor, A_RI: Tensor, B_RO: Tensor, ranks_A2: Tensor, bounds: Tensor, choice_S: Tensor
) -> Tensor:
    """Add to `y` (T, out) in place, and return it.

    x (T, in), A (R, in), B (R, out) in y's dtype. int32 on the CPU: ranks (adapters, 2), the first row of A and B that
    an adapter uses and the one behind its last; bounds (S + 1,), segment s being tokens bounds[s] to bounds[s + 1],
    others unchanged; choice (S,), an adapter each.
    """
    if x_TI.shape != (len(y_TO), A_RI.shape[1]) or B_RO.shape != (len(A_RI), y_TO.shape[1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (y_TO, x_TI, A_RI, B_RO))
        raise ValueError(f"sgmv_: y, x, A, B are {shapes}; expected (T, out), (T, in), (R, in), (R, out)")
    if not (ranks_A2.is_cpu and bounds.is_cpu and choice_S.is_cpu):
        devices = ", ".join(str(tensor.device) for tensor in (ranks_A2, bounds, choice_S))
        raise ValueError(f"sgmv_: ranks, bounds, choice are on {devices}; the host reads them, so they belong on cpu")
    add = sgmv_reference if y_TO.dtype == torch.float64 else _sgmv
    add(y_TO, x_TI, A_RI, B_RO, ranks_A2, bounds, choice_S)
    return y_TO


def sgmv_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, ranks: Tensor, bounds: Tensor, choice: Tensor
) -> None:
    """A loop over the segments in plain PyTorch."""
    wide = torch.promote_types(y.dtype, torch.float32)
    stops = bounds.tolist()
    for start, stop, adapter in zip(stops, stops[1:], choice.tolist(), strict=False):
        first, last = ranks[adapter].tolist()
        hidden = x[start:stop].to(wide) @ A[first:last].to(wide).t()
        part = y[start:stop]
        part.copy_(torch.addmm(part.to(wide), hidden, B[first:last].to(wide)))


def _sgmv_fake(y, x, A, B, ranks, bounds, choice) -> None:
    return None


_sgmv = extension.op("sgmv_", reference=sgmv_reference, fake=_sgmv_fake)
