"""How many tokens should have their logits in memory at a time?

    python benchmarks/loss_chunk.py                     # 2048 tokens of width 576, 49152 words, bf16, frozen head
    python benchmarks/loss_chunk.py --trainable

`linear_cross_entropy`, forward and backward, with chunks of several sizes, against PyTorch's `cross_entropy` of all
logits in fp32. Loss and gradients must agree first. Then all are timed in turns; memory comes from a fresh process
each: the most that is resident during two of them, less what is between.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from processes import RETURNING, PeakResident, run_ranks
from protocol import Times, check_close, stopwatch, take_turns
from results import Result, finish, parse
from torch import Tensor, nn

from minift.dist.process import World
from minift.objectives.cross_entropy import default_chunk_tokens, linear_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

WHOLE = "whole"


class Case:
    """One set of hidden states, targets and head, the same in every process."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden_TD = torch.randn(args.tokens, args.hidden, generator=generator).bfloat16().requires_grad_()
        self.head = nn.Linear(args.hidden, args.vocab, bias=False, dtype=torch.bfloat16)
        self.head.weight.data.copy_(torch.randn(args.vocab, args.hidden, generator=generator) * 0.05)
        self.head.requires_grad_(args.trainable)
        self.targets_T = torch.randint(args.vocab, (args.tokens,), generator=generator)

    def run(self, chunk: str) -> list[Tensor]:
        """The loss and the gradients."""
        if chunk == WHOLE:
            logits_TV = self.head(self.hidden_TD).float()
            loss = nn.functional.cross_entropy(logits_TV, self.targets_T, reduction="sum")
        else:
            loss = linear_cross_entropy(self.hidden_TD, self.head, self.targets_T, int(chunk))
        inputs = [self.hidden_TD, *(p for p in self.head.parameters() if p.requires_grad)]
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def runner(self, chunk: str) -> Callable[[], object]:
        return lambda: self.run(chunk)


def time_chunks(world: World, tell: object, args: argparse.Namespace) -> Times:
    case = Case(args)
    chunks = [*map(str, args.chunks), WHOLE]
    expected = case.run(WHOLE)
    for chunk in chunks:
        for part, ours, theirs in zip(("loss", "dhidden", "dhead"), case.run(chunk), expected, strict=False):
            check_close(f"{part}, chunk {chunk}", theirs, ours, 2**-6)  # theirs rounds logits' gradients to bf16 too
    return take_turns({chunk: stopwatch(case.runner(chunk)) for chunk in chunks}, args.rounds)


def hold(world: World, tell: object, job: tuple[argparse.Namespace, str]) -> float:
    """MiB beside inputs and weights."""
    args, chunk = job
    case = Case(args)
    case.run(chunk)
    peak = PeakResident()
    case.run(chunk)
    return (peak.bytes() - peak.held_bytes) / 2**20


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    runs = sorted(runs, key=lambda run: run["parameters"]["trainable"])
    figure.set_size_inches(4.6 * len(runs), 3.6)
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        chunks = [str(row["chunk_tokens"] or WHOLE) for row in run["rows"]]
        memory = axes.twinx()
        memory.bar(chunks, [row["peak_mib"] for row in run["rows"]], color=theme.quiet, alpha=0.45, width=0.6)
        memory.grid(visible=False)
        memory.spines["right"].set_visible(True)
        memory.set_ylabel("MiB (bars)")
        axes.plot(chunks, [row["seconds"] for row in run["rows"]], color=theme.ours, marker="o")
        axes.set_zorder(memory.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set_title("trainable head" if run["parameters"]["trainable"] else "frozen head")
        axes.set(xlabel="tokens in a chunk", ylabel="seconds (line)", ylim=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--trainable", action="store_true", help="train the head, too")
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)

    (times,) = run_ranks(1, time_chunks, args)
    default = default_chunk_tokens(args.vocab, 2, is_small=not args.trainable)
    result = Result("loss_chunk")
    result.count(times)
    print(f"{args.tokens} tokens, {args.vocab} words, bf16, one thread; the default here is {default} tokens")
    print(f"{'chunk':>8}{'seconds':>10}{'whole / it':>12}{'MiB':>8}")
    for chunk in times.seconds:
        row = {
            "chunk_tokens": None if chunk == WHOLE else int(chunk),
            "seconds": times.median(chunk),
            "speedup": times.ratio(WHOLE, chunk).median,
            "peak_mib": run_ranks(1, hold, (args, chunk), RETURNING)[0],
        }
        result.rows.append(row)
        print(f"{chunk:>8}{row['seconds']:10.3f}{row['speedup']:11.2f}x{row['peak_mib']:8.0f}")
    near = min(result.rows[:-1], key=lambda row: abs(row["chunk_tokens"] - default))
    result.values = {
        "default_chunk_tokens": default,
        "speedup_near_default": near["speedup"],
        "memory_ratio_near_default": near["peak_mib"] / result.rows[-1]["peak_mib"],
    }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
