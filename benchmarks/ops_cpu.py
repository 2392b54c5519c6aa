"""How much faster are minift's CPU ops than the same formulas in PyTorch's eager mode?

    python benchmarks/ops_cpu.py                       # the shapes of SmolLM2-135M, 500 tokens, one thread
    python benchmarks/ops_cpu.py --instruction-set avx2 --dtype float32

"eager" is the formula as Hugging Face's modeling code writes it, its backward what autograd derives from that.
Attention is compared with PyTorch's own, called once for each document (sdpa), and with the plain-PyTorch reference
(blocked), on packs of documents with the lengths in DOCUMENTS, three query heads to a key head.

Each case first checks that both sides agree, then times them in turns.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from protocol import check_close, stopwatch, take_turns
from results import Result, finish, parse
from torch import Tensor

from minift.ops import extension
from minift.ops.attention import causal_attention
from minift.ops.blocked_attention import blocked_attention, blocked_attention_backward
from minift.ops.low_rank import factor_gradients_, from_rank, to_rank
from minift.ops.norm import rms_norm, rms_norm_backward
from minift.ops.rope import apply_rope
from minift.ops.swiglu import swiglu
from minift.style import label_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

EPS = 1e-5
RANK = 16
DOCUMENTS = {
    "30 of 40": [40] * 30,
    "8 of 100-250": [100, 120, 140, 165, 185, 205, 230, 250],
    "1 of 512": [512],
    "1 of 2048": [2048],
}  # tokens


@dataclass(frozen=True)
class Case:
    name: str
    eager: Callable[[], tuple[Tensor, ...]]
    minift: Callable[[], tuple[Tensor, ...]]


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def make_cases(args: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, dy, weight = random(args.tokens, args.hidden), random(args.tokens, args.hidden), random(args.hidden)
    _, rstd = rms_norm(x, weight, EPS)
    gate, up, dy_mlp = (random(args.tokens, args.intermediate) for _ in range(3))
    heads, dy_heads = (random(args.tokens, args.heads, args.head_dim) for _ in range(2))
    angle_TR = torch.rand(args.tokens, args.head_dim // 2) * 6
    cos, sin = angle_TR.cos(), angle_TR.sin()
    full_cos, full_sin = (torch.cat((t, t), dim=-1).unsqueeze(1).to(dtype) for t in (cos, sin))

    def backward(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """The backward pass alone: the graph is recorded once and kept."""
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*inputs)
        return lambda: torch.autograd.grad(output, inputs, dy, retain_graph=True)

    return [
        Case("rms_norm", lambda: (eager_rms_norm(x, weight),), lambda: (rms_norm(x, weight, EPS)[0],)),
        Case(
            "rms_norm backward, frozen weight",
            backward(lambda x: eager_rms_norm(x, weight), [x], dy),
            lambda: rms_norm_backward(dy, x, weight, rstd, None, False)[:1],
        ),
        Case(
            "rms_norm backward",
            backward(eager_rms_norm, [x, weight], dy),
            lambda: rms_norm_backward(dy, x, weight, rstd, None, True),
        ),
        Case("swiglu", lambda: (eager_swiglu(gate, up),), lambda: (swiglu(gate, up),)),
        Case("swiglu backward", backward(eager_swiglu, [gate, up], dy_mlp), backward(swiglu, [gate, up], dy_mlp)),
        Case("rope", lambda: (eager_rope(heads, full_cos, full_sin),), lambda: (apply_rope(heads, cos, sin),)),
        Case(
            "rope backward",
            backward(lambda x: eager_rope(x, full_cos, full_sin), [heads], dy_heads),
            backward(lambda x: apply_rope(x, cos, sin), [heads], dy_heads),
        ),
    ]


def make_low_rank_cases(args: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    """Two projections of one x, as gate and up, by products of PyTorch: the A of both in one, the B each in its own."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, A_RI = random(args.tokens, args.hidden), random(2 * RANK, args.hidden)
    factors_A, factors_B = [A_R.t() for A_R in A_RI.split(RANK)], [random(args.intermediate, RANK) for _ in range(2)]
    douts, narrow = [random(args.tokens, args.intermediate) for _ in range(2)], random(args.tokens, 2 * RANK)
    narrows = list(narrow.split(RANK, dim=1))
    gradients = [torch.empty_like(factor) for factor in factors_B]

    def updates_eager() -> tuple[Tensor, ...]:
        return tuple(torch.mm(h, B.t()) for h, B in zip(narrows, factors_B, strict=True))

    def updates() -> tuple[Tensor, ...]:
        return tuple(from_rank(narrows, factors_B, [1] * len(factors_B), [None] * len(factors_B)))

    def gradients_of_B() -> tuple[Tensor, ...]:
        factor_gradients_(gradients, douts, narrows)
        return tuple(gradients)

    return [
        Case("LoRA, x A", lambda: (torch.mm(x, A_RI.t()),), lambda: (to_rank([x], factors_A, [1.0, 1.0]),)),
        Case("LoRA, h B", updates_eager, updates),
        Case(
            "LoRA, gradients of B",
            lambda: tuple(torch.mm(dout.t(), h) for dout, h in zip(douts, narrows, strict=True)),
            gradients_of_B,
        ),
    ]


class Blocked(torch.autograd.Function):
    """The reference as a differentiable function: what ran before there was a kernel."""

    @staticmethod
    def forward(ctx, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, bounds: Tensor) -> Tensor:
        out_THE, lse_TH = blocked_attention(q_THE, k_TKE, v_TKE, bounds, bounds, None)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, out_THE, lse_TH, bounds, bounds)
        return out_THE

    @staticmethod
    def backward(ctx, dout_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *blocked_attention_backward(dout_THE, *ctx.saved_tensors, None), None


def sdpa(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, lengths: list[int]) -> Tensor:
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_THE, k_TKE, v_TKE)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    outs = [attend(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0] for q, k, v in documents]
    return torch.cat(outs, dim=1).transpose(0, 1)


def make_attention_cases(args: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    cases = []
    for name, lengths in DOCUMENTS.items():
        heads = (args.heads, args.heads // 3, args.heads // 3)
        inputs = [torch.randn(sum(lengths), count, args.head_dim).to(dtype) for count in heads]
        bounds, dout = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), torch.randn_like(inputs[0])
        functions = {
            "sdpa": partial(sdpa, lengths=lengths),
            "blocked": lambda q, k, v, bounds=bounds: Blocked.apply(q, k, v, bounds),
            "minift": partial(causal_attention, q_bounds=bounds, kv_bounds=bounds),
        }

        def forward(function: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> Callable[[], tuple[Tensor, ...]]:
            return lambda: (function(*inputs),)

        def step(
            function: Callable[..., Tensor], inputs: list[Tensor] = inputs, dout: Tensor = dout
        ) -> Callable[[], tuple[Tensor, ...]]:
            """Forward and backward."""
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

        for other in ("sdpa", "blocked"):
            for what, timed in (("", forward), (", forward + backward", step)):
                title = f"attention, {name}{what} ({other})"
                cases.append(Case(title, timed(functions[other]), timed(functions["minift"])))
    return cases


def measure(case: Case, dtype: torch.dtype, rounds: int, result: Result) -> dict[str, Any]:
    """A row of the table, after both sides were found to compute the same."""
    for expected, actual in zip(case.eager(), case.minift(), strict=True):
        # Four roundings of the dtype; sums over tokens (dweight) add some of terms that cancel, hence 8.
        check_close(f"{case.name} {dtype}", expected, actual, 8 * max(torch.finfo(dtype).eps, 1e-6))
    once = stopwatch(case.eager, calls=3)()
    calls = max(1, int(2e-3 / once))  # about 2 ms a turn
    rounds = min(rounds, max(5, int(3 / once)))  # no more than some seconds a case
    times = take_turns({name: stopwatch(getattr(case, name), calls=calls) for name in ("eager", "minift")}, rounds)
    result.count(times)
    return {
        "name": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "eager_us": times.median("eager") * 1e6,
        "minift_us": times.median("minift") * 1e6,
        "speedup": times.ratio("eager", "minift").median,
    }


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Speedups in bf16."""
    rows = [row for row in runs[-1]["rows"] if row["dtype"] == "bfloat16"]
    figure.set_size_inches(9, 0.8 + 0.25 * len(rows))
    axes = figure.subplots()
    bars = axes.barh([row["name"] for row in rows], [row["speedup"] for row in rows], color=theme.ours)
    label_bars(axes, bars, [f"{row['speedup']:.1f}×" for row in rows])
    axes.axvline(1, color=theme.ink, linewidth=1)
    axes.set_title("times as fast as PyTorch, bf16")
    axes.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument(
        "--instruction-set", default="best", choices=["best", "portable", "avx2", "avx512", "avx512_bf16"]
    )
    args = parse(parser)

    torch.set_num_threads(args.threads)
    if extension.MISSING_REASON is not None:
        raise SystemExit(f"nothing to measure: the extension is missing ({extension.MISSING_REASON})")
    torch.ops.minift.use_instruction_set(args.instruction_set)

    print(f"torch {torch.__version__}, {extension.instruction_set()}, {args.threads} thread(s), {args.tokens} tokens")
    print(f"{'op':56}{'dtype':10}{'eager us':>10}{'minift us':>11}{'speedup':>9}")
    result = Result("ops_cpu")
    for dtype in (getattr(torch, name) for name in args.dtype):
        low_rank = make_low_rank_cases(args, dtype) if dtype == torch.bfloat16 else []  # the only one with kernels
        for case in make_cases(args, dtype) + low_rank + make_attention_cases(args, dtype):
            row = measure(case, dtype, args.rounds, result)
            result.rows.append(row)
            print(
                f"{row['name']:56}{row['dtype']:10}{row['eager_us']:10.0f}{row['minift_us']:11.0f}"
                f"{row['speedup']:8.1f}x",
                flush=True,
            )
    result.values = {f"{row['name']}, {row['dtype']}": row["speedup"] for row in result.rows}
    finish(args, result, draw)


if __name__ == "__main__":
    main()
