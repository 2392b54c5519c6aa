"""What would thousands of GPUs do? The engine's schedule, simulated; no GPU is needed, and none was measured.

    python benchmarks/scaling.py --write --picture

Weak scaling: every GPU computes the same number of tokens, however many there are; the global batch grows. Efficiency
is the time of a step without communication over the time of a step. Nodes of 8 H100 with NVLink inside and an interface
of 400 Gbit/s for each GPU to outside; figures of `minift/planner/catalog.py`, which says where they are from. Gathers
and sums as NCCL's rings and trees would do them (`minift/planner/network.py`).

    ZeRO-3        everything is sharded over all GPUs
    HSDP          over as many as it takes to fit, and copies of that; gradients are summed over the copies once a step
    LoRA          frozen weights sharded over all GPUs, gathered in 16 bits
    QLoRA, NF4    the same, gathered in 4 bits

What is not in it: GPUs of unequal speed, networks with other traffic, kernels that communication slows. So these are
upper bounds, and what they show is where latency (hops of a ring) and bandwidth begin to count. Points at which a plan
does not fit into the GPU's memory are left out. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from typing import Any

from results import Result, finish, parse

from minift.fsdp import ShardPolicy
from minift.peft.lora import LoraConfig
from minift.planner.catalog import gpu, model_shape, network
from minift.planner.describe import describe
from minift.planner.memory import plan_memory
from minift.planner.network import Network, Protocol
from minift.planner.plan import Machine
from minift.planner.shapes import RunShape, Workload
from minift.planner.timing import time_step
from minift.planner.trial import TrialSetup
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig

PANELS = (("llama-3.1-8b", 8192), ("llama-3.1-8b", 2048), ("llama-3.1-70b", 4096), ("llama-3.1-70b", 1024))
"""Models, and the tokens of a GPU and step."""
RANKS_PER_NODE = 8
NETWORK = "nvlink"
DOCUMENT_TOKENS = 4096
FREE = Network(math.inf, math.inf, RANKS_PER_NODE, (Protocol(),))


@dataclass(frozen=True)
class Way:
    """How to train. copy_ranks: GPUs over which one copy of a model is sharded; None: all."""

    name: str
    setup: TrialSetup
    copy_ranks: dict[str, int] | None = None


FULL = TrialSetup(recompute=RecomputeConfig("full"))
WAYS = (
    Way("ZeRO-3, full", FULL),
    Way("HSDP, full", FULL, {"llama-3.1-8b": 8, "llama-3.1-70b": 64}),
    Way("LoRA, bf16 base", replace(FULL, adapter=LoraConfig(r=16))),
    Way("QLoRA, NF4 base", replace(FULL, adapter=LoraConfig(r=16), quant=QuantConfig())),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4096, help="GPUs")
    args = parse(parser, is_timed=False)

    rows = []
    heads = f"{'GPUs':>6}{'GiB':>7}{'step s':>9}{'efficiency':>12}{'exposed s':>11}{'tokens/s':>12}"
    print(f"{'model':16}{'tokens':>7}  {'way':18}{heads}")
    for model, tokens in PANELS:
        for way in WAYS:
            for exponent in range(int(math.log2(args.most)) + 1):
                row = point(model, way, 2**exponent, tokens)
                if row is None:
                    continue
                rows.append(row)
                print(
                    f"{model:16}{tokens:7}  {way.name:18}{row['gpus']:6}{row['peak_bytes'] / 2**30:7.1f}"
                    f"{row['step_seconds']:9.3f}{row['efficiency']:12.3f}{row['exposed_seconds']:11.3f}"
                    f"{row['tokens_per_second']:12.0f}"
                )
    largest = {
        f"{row['model']}, {row['tokens']} tokens, {row['way']}": round(row["efficiency"], 3)
        for row in rows
        if row["gpus"] == args.most
    }
    values = {f"efficiency_on_{args.most}": largest}
    finish(args, Result("scaling", values, rows), draw)


def point(model: str, way: Way, gpus: int, tokens: int) -> dict[str, Any] | None:
    """One step; None where there is no such plan, or it does not fit."""
    copy_ranks = gpus if way.copy_ranks is None else way.copy_ranks[model]
    if gpus % copy_ranks or (way.copy_ranks is not None and gpus == copy_ranks):
        return None
    machine = Machine.of_gpus("h100", gpus, NETWORK)
    setup = replace(way.setup, fsdp=ShardPolicy(replicas=gpus // copy_ranks))
    workload = Workload(tokens=tokens, document_tokens=min(tokens, DOCUMENT_TOKENS))
    run: RunShape = describe(model_shape(model), setup, world_size=gpus, link="nccl", workload=workload)
    peak_bytes = plan_memory(run).peak_bytes
    if peak_bytes > machine.usable_bytes:
        return None
    device, links = gpu("h100"), network(NETWORK)
    timed, alone = time_step(run, device, links), time_step(run, device, FREE)
    return {
        "model": model, "tokens": tokens, "way": way.name, "gpus": gpus, "peak_bytes": peak_bytes,
        "step_seconds": timed.seconds, "exposed_seconds": timed.exposed_s,
        "efficiency": alone.seconds / timed.seconds, "tokens_per_second": tokens * gpus / timed.seconds,
    }  # fmt: skip


def draw(figure: Any, theme: Any, runs: list[dict[str, Any]]) -> None:
    """Efficiency against the number of GPUs."""
    rows = runs[-1]["rows"]
    figure.set_size_inches(10, 7)
    panels = figure.subplots(2, 2, sharey=True, sharex=True).flat
    for axes, (model, tokens) in zip(panels, PANELS, strict=True):
        shown = [row for row in rows if (row["model"], row["tokens"]) == (model, tokens)]
        for way, colour in zip(WAYS, theme.series, strict=False):
            points = [(row["gpus"], row["efficiency"]) for row in shown if row["way"] == way.name]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=way.name)
        axes.set_xscale("log", base=2)
        ticks = [4**power for power in range(int(math.log(max(row["gpus"] for row in rows), 4)) + 1)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0, 1.04)
        axes.set_title(f"{model}, {tokens} tokens a GPU and step")
    for axes in figure.axes[::2]:
        axes.set_ylabel("step without communication / step")
    for axes in figure.axes[2:]:
        axes.set_xlabel("GPUs (H100, nodes of 8)")
    figure.axes[0].legend(loc="lower left")
    figure.suptitle("simulated, not measured: an upper bound", fontsize=9, color=theme.quiet)


if __name__ == "__main__":
    main()
