"""What does it cost to give every row of a batch an adapter of its own?

    python benchmarks/adapters_per_row.py            # SmolLM2-135M's shapes, 8 rows, 8 adapters of rank 16, bf16
    python benchmarks/adapters_per_row.py --mixed    # ranks 4, 8, 16, 32 in turns

A step of decoding (one token a row, after 128) and a prefill (64 tokens a row), as `generate` computes them, on one
thread: with one adapter for all rows, with one for each (`peft.per_row`), with none, and in as many forwards as there
are rows, which is what is left without. The logits of all rows must first be those of the separate forwards: in fp32
within 1e-4 of the largest, in bf16 within 2^-4 (30 blocks of roundings, other matrix products for other batches).

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from processes import run_ranks
from protocol import Times, Turn, check_close, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import make_model
from torch import Tensor

from minift.dist.process import World
from minift.peft.lora import LoraConfig
from minift.peft.per_row import per_row
from minift.peft.resident import Residents

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

RANKS = (4, 8, 16, 32)
HELD_TOKENS = 128  # in the cache of each row before a step of decoding
PHASES = {"decode": 1, "prefill": 64}  # new tokens of each row
ONE, EACH, NONE, APART = "one adapter", "one for each row", "no adapter", "row by row"


class Case:
    """A model with an adapter for each row, all of whose B are random."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype) -> None:
        self.model = make_model(args.layers, args.vocab).to(dtype).eval()
        self.residents = Residents(self.model)
        self.names = [str(row) for row in range(args.rows)]
        generator = torch.Generator().manual_seed(0)
        for row, name in enumerate(self.names):
            rank = RANKS[row % len(RANKS)] if args.mixed else args.rank
            self.residents.add(name, LoraConfig(r=rank))
            for full_name, parameter in self.residents[name].tensors():
                if full_name.endswith("lora_B.weight"):
                    parameter.data.normal_(std=0.02, generator=generator)
                parameter.data = parameter.data.to(dtype)  # as load_assistant has them
        self.cache = self.model.new_cache(args.rows, HELD_TOKENS + max(PHASES.values()))
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_(generator=generator)
        self.tokens = torch.randint(args.vocab, (args.rows, max(PHASES.values())), generator=generator)

    def forward(self, rows: Sequence[int], num_tokens: int) -> Tensor:
        """Logits (rows, V) behind `num_tokens` new tokens of each of these rows, neighbours."""
        cache = self.cache.part(rows[0], rows[-1] + 1)
        held = HELD_TOKENS if num_tokens == 1 else 0
        cache.lengths = [held] * len(rows)
        bounds = torch.arange(len(rows) + 1, dtype=torch.int32) * num_tokens
        return self.model(
            self.tokens[list(rows), :num_tokens].flatten(), held + torch.arange(num_tokens).repeat(len(rows)), bounds,
            num_tokens, head=lambda hidden_TD, lm_head: lm_head(hidden_TD[bounds[1:].long() - 1]), cache=cache,
        )  # fmt: skip

    def all_rows(self, num_tokens: int) -> Tensor:
        return self.forward(range(len(self.names)), num_tokens)

    def each(self, num_tokens: int, calls: int) -> float:
        """Seconds of a forward with an adapter for each row."""
        bounds = torch.arange(len(self.names) + 1, dtype=torch.int32) * num_tokens
        with per_row(self.residents, self.names) as rows:

            def forward() -> None:
                rows.begin(range(len(self.names)), bounds)
                self.all_rows(num_tokens)

            forward()
            return stopwatch(forward, calls=calls)()

    def within(
        self, context: Callable[[], AbstractContextManager], function: Callable[[], object], calls: int
    ) -> float:
        """Seconds of a call of `function` in a context."""
        with torch.no_grad(), context():
            function()
            return stopwatch(function, calls=calls)()

    def apart(self, num_tokens: int) -> Tensor:
        logits = []
        for row, name in enumerate(self.names):
            with self.residents.using(name):
                logits.append(self.forward([row], num_tokens))
        return torch.cat(logits)

    def variants(self, num_tokens: int, calls: int) -> dict[str, Turn]:
        forward = partial(self.all_rows, num_tokens)
        middle = self.names[2]  # of `--mixed` ranks, the one next to their mean
        return {
            ONE: partial(self.within, partial(self.residents.using, middle), forward, calls),
            NONE: partial(self.within, self.residents.using, forward, calls),
            APART: partial(self.within, self.residents.using, partial(self.apart, num_tokens), 1),
            EACH: partial(self.each, num_tokens, calls),
        }

    @torch.no_grad()
    def check(self, tolerance: float) -> None:
        for phase, num_tokens in PHASES.items():
            expected = self.apart(num_tokens)
            with per_row(self.residents, self.names) as rows:
                rows.begin(range(len(self.names)), torch.arange(len(self.names) + 1, dtype=torch.int32) * num_tokens)
                check_close(f"{phase}, {expected.dtype}", expected, self.all_rows(num_tokens), tolerance)


def time_variants(world: World, tell: object, args: argparse.Namespace) -> dict[str, Times]:
    Case(args, torch.float32).check(1e-4)
    case = Case(args, torch.bfloat16)
    case.check(2**-4)
    calls = {"decode": args.calls, "prefill": max(1, args.calls // 4)}
    return {
        phase: take_turns(case.variants(num_tokens, calls[phase]), args.rounds) for phase, num_tokens in PHASES.items()
    }


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    from minift.style import label_bars

    runs = sorted(runs, key=lambda run: run["parameters"]["mixed"])
    figure.set_size_inches(9.0, 2.3 * len(runs))
    for line, run in zip(figure.subplots(len(runs), 2, squeeze=False), runs, strict=True):
        for axes, phase in zip(line, PHASES, strict=True):
            rows = [row for row in run["rows"] if row["phase"] == phase]
            colours = [theme.ours if row["variant"] == EACH else theme.quiet for row in rows]
            bars = axes.barh([row["variant"] for row in rows], [1e3 * row["seconds"] for row in rows], color=colours)
            label_bars(axes, bars, [f"{1e3 * row['seconds']:.0f} ms" for row in rows])
            axes.invert_yaxis()
            ranks = "ranks 4 to 32" if run["parameters"]["mixed"] else f"rank {run['parameters']['rank']}"
            axes.set_title(f"{phase}, {run['parameters']['rows']} rows of {PHASES[phase]} tokens, {ranks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=8, help="of the batch, each with an adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--mixed", action="store_true", help="other ranks for other rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=4, help="steps of decoding in a turn")
    args = parse(parser)

    (found,) = run_ranks(1, time_variants, args)
    result = Result("adapters_per_row")
    for phase, times in found.items():
        result.count(times)
        print(f"{phase:>8}{'seconds':>26}{'one adapter':>14}")
        for variant in times.seconds:
            ratio = times.ratio(variant, ONE)
            result.rows.append(
                {"phase": phase, "variant": variant, "seconds": times.median(variant), "over_one_adapter": ratio.median}
            )
            print(f"{variant:>24}{times.median(variant):10.4f}{ratio.median:13.2f}x")
        result.values[f"{phase}_over_one_adapter"] = times.ratio(EACH, ONE).median
        result.values[f"{phase}_apart_over_each"] = times.ratio(APART, EACH).median
    finish(args, result, draw)


if __name__ == "__main__":
    main()
