"""How much memory does a rank take under each strategy, against the number of ranks?

    python benchmarks/memory_per_rank.py                    # DDP, ZeRO-1, 2, 3 and HSDP on 1, 2, 4 and 8 ranks
    python benchmarks/memory_per_rank.py --ranks 2 --method lora

SmolLM2's shapes with fewer layers and words, so that eight whole copies fit into one machine; documents are short, so
that activations do not hide the engine. Ranks exchange tensors by sends, as between hosts: sharing memory would flatter
one host. *Measured* is the largest peak of resident memory of any rank over three steps that follow two, less what the
process held before it had a model. *Closed form* is what the engine says it holds (`ShardedModel.held_bytes`) and the
optimizer's moments; what is measured beside it is activations, staging of sends, and libraries at work.

Prints a table, and one line of JSON last. Nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from processes import RETURNING, PeakResident, resident_bytes, run_ranks
from results import Result, finish, parse
from smollm2 import Trainee, random_batch

from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.fsdp.transport import PairedSends
from minift.peft.lora import LoraConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

STRATEGIES: dict[str, Callable[[], ShardPolicy]] = {
    "ddp": lambda: ShardPolicy(strategy="ddp"),
    "zero1": lambda: ShardPolicy(strategy="zero1"),
    "zero2": lambda: ShardPolicy(strategy="zero2"),
    "zero3": lambda: ShardPolicy(),
    "zero3, 2 replicas": lambda: ShardPolicy(replicas=2),
}


def hold(world: World, tell: object, job: tuple[argparse.Namespace, str]) -> dict[str, float]:
    """MiB of this rank."""
    args, strategy = job
    batches = [random_batch(args.tokens + 1, 100 * number + world.rank, args.vocab) for number in range(5)]
    before = resident_bytes()
    adapter = LoraConfig(r=16) if args.method == "lora" else None
    trainee = Trainee(
        world, args.layers, args.vocab, policy=STRATEGIES[strategy](), adapter=adapter, connect=PairedSends
    )
    for batch in batches[:2]:
        trainee.step([batch])
    gc.collect()  # the whole model, before it was sharded
    dist.barrier()
    peak = PeakResident()
    for batch in batches[2:]:
        trainee.step([batch])
    states = trainee.optimizer.state_dict()
    moments = [tensor for shard in trainee.optimizer.shards for tensor in states[shard.name].values()]
    held = trainee.engine.held_bytes() | {"moments": sum(tensor.nbytes for tensor in moments)}
    return {"measured_mib": (peak.bytes() - before) / 2**20} | {f"{k}_mib": v / 2**20 for k, v in held.items()}


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    figure.set_size_inches(4.6 * len(runs), 3.8)
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        for strategy, colour in zip(STRATEGIES, theme.series, strict=False):
            rows = [row for row in run["rows"] if row["strategy"] == strategy]
            ranks = [str(row["ranks"]) for row in rows]
            axes.plot(ranks, [row["measured_mib"] for row in rows], color=colour, marker="o", label=strategy)
            axes.plot(ranks, [row["closed_form_mib"] for row in rows], color=colour, linestyle=":")
        axes.plot([], [], color=theme.quiet, linestyle=":", label="closed form")
        axes.set_title({"lora": "LoRA r=16", "full": "full fine-tuning"}[run["parameters"]["method"]])
        axes.set(xlabel="ranks", ylabel="MiB per rank", ylim=(0, None))
        axes.legend(loc="lower left", fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--method", default="full", choices=["full", "lora"])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32, help="per rank and step")
    args = parse(parser, is_timed=False)

    result = Result("memory_per_rank")
    print(f"{args.method}, {args.layers} layers, {args.vocab} words, {args.tokens} tokens, bf16 wire; MiB per rank")
    columns = ("shards", "gathered", "gradients", "moments", "closed form", "measured")
    print(f"{'ranks':7}{'strategy':20}" + "".join(f"{column:>13}" for column in columns))
    for num_ranks in args.ranks:
        for strategy, policy in STRATEGIES.items():
            if num_ranks % policy().replicas:
                continue
            per_rank = run_ranks(num_ranks, hold, (args, strategy), RETURNING)
            largest = max(per_rank, key=lambda rank: rank["measured_mib"])
            parts = [largest[f"{part}_mib"] for part in columns[:4]]
            row = {"ranks": num_ranks, "strategy": strategy, **largest, "closed_form_mib": sum(parts)}
            result.rows.append(row)
            cells = [*parts, row["closed_form_mib"], row["measured_mib"]]
            print(f"{num_ranks:<7}{strategy:20}" + "".join(f"{cell:13.1f}" for cell in cells), flush=True)
    by_key = {(row["ranks"], row["strategy"]): row["measured_mib"] for row in result.rows}
    most = max(args.ranks)
    result.values = {f"zero3_to_ddp_on_{most}_ranks": by_key[most, "zero3"] / by_key[most, "ddp"]}
    finish(args, result, draw)


if __name__ == "__main__":
    main()
