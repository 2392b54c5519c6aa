"""What does it cost to keep a part of a step in host memory? The engine's schedule, simulated; no GPU is needed.

    python benchmarks/offload.py --write

A step of 8192 tokens in documents of 4096, on one GPU whose blocks run again in backward, with nothing in host memory
or with one of these:

    frozen weights    of every other block, or of all of them (fsdp.offload_frozen, prefetch_units 2)
    inputs            of blocks, from forward to backward (recompute.policy offload)
    moments           of AdamW, which come and go in pages (optim.paged), in fp32 and in 8 bits

Figures of `minift/planner/catalog.py`: 53 GB/s each way over the bus of an H100, 25 GB/s over that of an RTX 4090. The
simulation takes what the engine takes where streams have clocks, to a thousandth (tests/pretended_cuda/test_times.py).
What an H100 took with nothing in host memory, plans said to within 10 % (tests/planner/test_h100.py), and LoRA with
frozen weights of every other block there to within 5 %; nothing else that crosses its bus was measured. Prints a table,
and one line of JSON last.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from results import Result, finish, parse

from minift.fsdp import ShardPolicy
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner.catalog import model_shape
from minift.planner.describe import describe
from minift.planner.memory import plan_memory
from minift.planner.plan import Machine
from minift.planner.shapes import Workload
from minift.planner.timing import time_step
from minift.planner.trial import TrialSetup
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig

DEVICES = ("h100", "rtx4090")
TOKENS, DOCUMENT_TOKENS = 8192, 4096


@dataclass(frozen=True)
class Case:
    """away: what is in host memory."""

    model: str
    method: str
    away: str
    setup: TrialSetup


LORA = TrialSetup(adapter=LoraConfig(r=16), recompute=RecomputeConfig("full"))
QLORA = replace(LORA, quant=QuantConfig())
FULL = TrialSetup(recompute=RecomputeConfig("full"))
INPUTS = RecomputeConfig("offload")


def without_frozen(*patterns: str) -> TrialSetup:
    return replace(LORA, fsdp=ShardPolicy(offload_frozen=patterns, prefetch_units=2))


CASES = (
    Case("llama-3.1-8b", "LoRA", "nothing", LORA),
    Case("llama-3.1-8b", "LoRA", "inputs of blocks", replace(LORA, recompute=INPUTS)),
    Case("llama-3.1-8b", "LoRA", "frozen weights, every other block", without_frozen("[13579]$")),
    Case("llama-3.1-8b", "LoRA", "frozen weights, all blocks", without_frozen("layers")),
    Case("llama-3.1-8b", "QLoRA", "nothing", QLORA),
    Case("llama-3.1-8b", "QLoRA", "inputs of blocks", replace(QLORA, recompute=INPUTS)),
    Case("llama-3.2-1b", "full", "nothing", FULL),
    Case("llama-3.2-1b", "full", "moments", replace(FULL, optim=OptimConfig(paged=True))),
    Case("llama-3.2-1b", "full, 8-bit AdamW", "nothing", replace(FULL, optim=OptimConfig(state="8bit"))),
    Case("llama-3.2-1b", "full, 8-bit AdamW", "moments", replace(FULL, optim=OptimConfig(state="8bit", paged=True))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    args = parse(parser, is_timed=False)

    rows = []
    heads = f"{'GB':>6}{'host GB':>9}{'step s':>9}{'waits s':>9}"
    print(f"{'model':14}{'method':19}{'in host memory':35}{'device':9}{heads}")
    for case in CASES:
        for device in DEVICES:
            row = point(case, device, args.tokens)
            rows.append(row)
            print(
                f"{case.model:14}{case.method:19}{case.away:35}{device:9}{row['peak_gb']:6.1f}{row['host_gb']:9.1f}"
                f"{row['step_seconds']:9.3f}{row['exposed_seconds']:9.3f}{'' if row['fits'] else '   does not fit'}"
            )
    finish(args, Result("offload", {"tokens": args.tokens}, rows), draw)


def point(case: Case, device: str, tokens: int) -> dict[str, Any]:
    machine = Machine.of_gpus(device, 1, "nvlink")
    workload = Workload(tokens=tokens, document_tokens=min(tokens, DOCUMENT_TOKENS))
    run = describe(model_shape(case.model), case.setup, world_size=1, link="nccl", workload=workload)
    memory, timed = plan_memory(run), time_step(run, machine.device, machine.network)
    return {
        "model": case.model, "method": case.method, "away": case.away, "device": device,
        "peak_gb": memory.peak_bytes / 1e9, "host_gb": sum(memory.host.values()) / 1e9,
        "fits": memory.peak_bytes <= machine.usable_bytes,
        "step_seconds": timed.seconds, "exposed_seconds": timed.exposed_s, "tokens_per_second": tokens / timed.seconds,
    }  # fmt: skip


def draw(figure: Any, theme: Any, runs: list[dict[str, Any]]) -> None:
    """Seconds of a step, and how many of them it only waits."""
    rows = runs[-1]["rows"]
    figure.set_size_inches(11, 4.6)
    panels = figure.subplots(1, len(DEVICES), sharey=True)
    names = [f"{case.model}, {case.method}: {case.away}" for case in CASES]
    for axes, device in zip(panels, DEVICES, strict=True):
        shown = [row for row in rows if row["device"] == device]
        axes.barh(names, [row["step_seconds"] for row in shown], color=theme.ours, label="a step")
        waits = [row["exposed_seconds"] for row in shown]
        starts = [row["step_seconds"] - wait for row, wait in zip(shown, waits, strict=True)]
        axes.barh(names, waits, left=starts, color=theme.theirs, label="of it, only waiting")
        for name, row in zip(names, shown, strict=True):
            axes.annotate(
                f"{row['peak_gb']:.1f} GB", (row["step_seconds"], name), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        axes.set_xlim(0, 1.16 * max(row["step_seconds"] for row in shown))
        axes.set_title(f"{device}: seconds, and GB of its memory")
        axes.grid(axis="y", visible=False)
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower right")
    figure.suptitle("simulated, not measured", fontsize=9, color=theme.quiet)


if __name__ == "__main__":
    main()
