"""Cases of `ops_cuda`: AdamW, and low-rank products, by themselves and inside SwiGLU. Peers: torch's fused AdamW,
bitsandbytes where it is installed, and a product by torch for each matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from cuda_case import BF16, Case, Maker, Run, as_tuple, check_all_close
from ops_cpu import RANK
from torch import Tensor, nn

from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.adamw_8bit import QuantizedMoments, adamw_8bit_
from minift.ops.blockwise import BLOCK, dynamic_map, quantize_blockwise
from minift.ops.halves import read_weights, write_weights_
from minift.ops.low_rank import factor_gradients_, from_rank, to_rank
from minift.ops.sgmv import sgmv_
from minift.ops.swiglu import swiglu_backward_, swiglu_forward
from minift.ops.updated_swiglu import updated_swiglu, updated_swiglu_backward_

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

LR, DECAY, BETA1, BETA2, EPS = 1e-3, 0.01, 0.9, 0.999, 1e-8
_ROOT = (1 - BETA2) ** 0.5
FIRST_STEP = AdamWStep(BETA1, BETA2, EPS * _ROOT, LR * _ROOT / (1 - BETA1), 1 - LR * DECAY, key=1)


def adamw(make: Maker) -> Iterator[Case]:
    """The first step is compared with torch's; it is that step's constants that are timed again and again."""
    n = make.sizes.weights
    start, grad = make.random(n).float(), make.random(n, scale=1e-3, dtype=torch.float32)
    maps = [dynamic_map(signed).to(make.device) for signed in (True, False)]

    def by_others(optimizer: Callable, **options: object) -> tuple[Tensor, Run]:
        parameter = nn.Parameter(start.clone())
        parameter.grad = grad
        return parameter.data, optimizer([parameter], lr=LR, weight_decay=DECAY, **options).step

    weights_by_torch, step_by_torch = by_others(torch.optim.AdamW, fused=True)
    step_by_torch()
    expected = weights_by_torch.clone()

    storages = "fp32 masters", "fp32 masters in halves", "bf16 masters"
    for is_8bit, masters in itertools.product((False, True), storages):
        in_halves = masters == "fp32 masters in halves"
        lower = torch.zeros_like(start, dtype=torch.int16) if in_halves else None
        master = torch.empty_like(start, dtype=torch.float32 if masters == "fp32 masters" else BF16)
        weights = Weights(master, grad, lower=lower)
        write_weights_(weights.master, lower, start)
        others = {"torch fused": step_by_torch}
        if is_8bit:
            zeros = [quantize_blockwise(torch.zeros_like(start), a_map) for a_map in maps]
            moments = QuantizedMoments(*zeros[0], *zeros[1])
            step = _step(adamw_8bit_, weights, moments, *maps, None, FIRST_STEP)
            if bitsandbytes is not None:
                others["bitsandbytes"] = by_others(bitsandbytes.optim.AdamW8bit)[1]
        else:
            step = _step(adamw_, weights, torch.zeros_like(start), torch.zeros_like(start), None, FIRST_STEP)

        def check(step: Run = step, weights: Weights = weights) -> None:
            step()
            # bf16 masters go up or down, by 2^-7 at most; fp32 ones through eight roundings.
            updated = read_weights(weights.master, weights.lower)
            check_all_close("AdamW", expected, updated, 2**-7 if updated.dtype == BF16 else 8 * 2**-23)

        moment_bytes = 2 * 2 * (1 + 4 / BLOCK) if is_8bit else 2 * 2 * 4  # read and written
        yield Case(
            f"AdamW{', 8-bit' if is_8bit else ''}, {masters}", step, check,
            n * (4 + 2 * (2 if masters == "bf16 masters" else 4) + moment_bytes), others=others,
        )  # fmt: skip


def _step(update: Callable, *arguments: object) -> Run:
    return lambda: update(*arguments)


def low_rank(make: Maker) -> Iterator[Case]:
    """LoRA of the three projections of attention that share x."""
    s = make.sizes
    outs = (s.hidden, s.kv, s.kv)
    wide_bytes, out_bytes = 2 * s.tokens * s.hidden, 2 * s.tokens * sum(outs)
    narrow_bytes, A_bytes, B_bytes = (2 * RANK * n for n in (s.tokens * len(outs), s.hidden * len(outs), sum(outs)))
    x = make.turns(lambda: [make.random(s.tokens, s.hidden)], wide_bytes)
    wides = make.turns(lambda: [make.random(s.tokens, out) for out in outs], out_bytes)
    A = [make.random(RANK, s.hidden, scale=0.02).t() for _ in outs]
    B = [make.random(out, RANK, scale=0.02) for out in outs]
    narrows = list(make.random(s.tokens, RANK * len(outs)).split(RANK, dim=1))
    gradients = [torch.empty(out, RANK, device=make.device) for out in outs]

    def updates(narrows: list[Tensor]) -> list[Tensor]:
        return from_rank(narrows, B, [1] * len(outs), [None] * len(outs))

    def updates_by_mm(narrows: list[Tensor]) -> list[Tensor]:
        return [torch.mm(h, b.t()) for h, b in zip(narrows, B, strict=True)]

    def gradients_of_B(wides: list[Tensor]) -> list[Tensor]:
        factor_gradients_(gradients, wides, narrows)
        return gradients

    for name, ours, by_mm, inputs, num_bytes in (
        (
            "LoRA, x A", lambda wides: to_rank(wides, A, [1.0] * len(A)),
            lambda wides: torch.cat([torch.mm(wides[0], a) for a in A], dim=1), x,
            wide_bytes + narrow_bytes + A_bytes,
        ),
        ("LoRA, h B", updates, updates_by_mm, lambda: narrows, out_bytes + narrow_bytes + B_bytes),
        (
            "LoRA, gradients of B", gradients_of_B,
            lambda wides: [torch.mm(out.t(), h) for out, h in zip(wides, narrows, strict=True)], wides,
            out_bytes + narrow_bytes + 2 * B_bytes,
        ),
    ):  # fmt: skip

        def check(ours: Callable = ours, by_mm: Callable = by_mm, inputs: Callable = inputs, name: str = name) -> None:
            one = inputs()
            check_all_close(name, as_tuple(by_mm([t.clone() for t in one])), as_tuple(ours([t.clone() for t in one])))

        yield Case(
            name, lambda ours=ours, inputs=inputs: ours(inputs()), check, num_bytes,
            others={"mm loop": lambda by_mm=by_mm, inputs=inputs: by_mm(inputs())},
        )  # fmt: skip


def gated(make: Maker) -> Iterator[Case]:
    """SwiGLU of a gate and an up that lack their updates, and its gradients, of a dy that does; the peer adds them up
    before. The gradient of gate takes the place of dy, whose values change from call to call."""
    s = make.sizes
    wide_bytes, narrow_bytes = 2 * s.tokens * s.intermediate, 2 * RANK * (s.tokens + s.intermediate)
    narrows = list(make.random(s.tokens, 3 * RANK).split(RANK, dim=1))
    factors = [make.random(s.intermediate, RANK, scale=0.02) for _ in range(3)]
    wides = make.turns(lambda: [make.random(s.tokens, s.intermediate) for _ in range(3)], 3 * wide_bytes)

    def whole(wides: list[Tensor]) -> list[Tensor]:
        return [torch.addmm(w, h, b.t()) for w, h, b in zip(wides, narrows, factors, strict=False)]

    def forward(wides: list[Tensor]) -> Tensor:
        return updated_swiglu(*wides[:2], narrows[:2], factors[:2], [1, 1])

    def forward_of_whole(wides: list[Tensor]) -> Tensor:
        return swiglu_forward(*whole(wides[:2]))

    def backward(wides: list[Tensor]) -> tuple[Tensor, ...]:
        gate, up, dy = wides
        return updated_swiglu_backward_(dy, gate, up, narrows, factors, [1, 1, 1])[:2]

    def backward_of_whole(wides: list[Tensor]) -> tuple[Tensor, ...]:
        gate, up, dy = whole(wides)
        return swiglu_backward_(dy, gate, up)[:2]

    for name, ours, theirs, num_wide in (
        ("swiglu with updates", forward, forward_of_whole, 3),
        ("swiglu with updates backward", backward, backward_of_whole, 5),
    ):

        def check(ours: Callable = ours, theirs: Callable = theirs, name: str = name) -> None:
            one = wides()
            # Theirs rounds the sums before.
            expected = as_tuple(theirs([t.clone() for t in one]))
            check_all_close(name, expected, as_tuple(ours([t.clone() for t in one])))

        yield Case(
            name, lambda ours=ours: ours(wides()), check, num_wide * wide_bytes + 3 * narrow_bytes,
            others={"updates before": lambda theirs=theirs: theirs(wides())},
        )  # fmt: skip


def adapters(make: Maker) -> Iterator[Case]:
    """Generation with an adapter for each of several segments."""
    s = make.sizes
    tokens, rank = s.adapters * s.adapter_tokens, s.adapters * RANK
    factors = make.turns(lambda: [make.random(rank, s.hidden, scale=0.02) for _ in "AB"], 4 * rank * s.hidden)
    x = make.random(tokens, s.hidden)
    y = torch.zeros_like(x)
    rows = torch.arange(0, rank + 1, RANK, dtype=torch.int32)
    ranks, choice = torch.stack((rows[:-1], rows[1:]), dim=1), torch.arange(s.adapters, dtype=torch.int32)
    bounds = torch.arange(0, tokens + 1, s.adapter_tokens, dtype=torch.int32)

    def ours(y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return sgmv_(y, x, A, B, ranks, bounds, choice)

    def by_mm(y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        segments = (tensor.split(s.adapter_tokens) for tensor in (y, x))
        for out, part, a, b in zip(*segments, A.split(RANK), B.split(RANK), strict=True):
            out.addmm_(torch.mm(part, a.t()), b)
        return y

    def check() -> None:
        one = factors()
        check_all_close("sgmv_", by_mm(torch.zeros_like(x), *one), ours(torch.zeros_like(x), *one))

    yield Case(
        f"sgmv_, {s.adapters} adapters", lambda: ours(y, *factors()), check, 3 * x.nbytes + 4 * rank * s.hidden,
        others={"mm loop": lambda: by_mm(y, *factors())},
    )  # fmt: skip
