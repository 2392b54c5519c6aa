"""Runs drawn at random, small enough for a CPU: what plans are held against."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from protocol import QUIET_SHARE, Load
from results import Result

from minift.dist.collectives import barrier, max_over_ranks
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.model.config import ModelConfig
from minift.peft.lora import LoraConfig
from minift.planner.shapes import Workload
from minift.planner.trial import Trial, TrialSetup
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig

GROUP_S = 0.6  # of steps that are timed together: long enough to see what others do meanwhile
GROUPS = 3


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    hf: dict[str, object]
    setup: TrialSetup
    workload: Workload

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf)

    def text(self) -> str:
        s, w, hf = self.setup, self.workload, self.hf
        rank = "" if s.adapter is None else f" r={s.adapter.r}"
        again = s.recompute.policy + (f"/{s.recompute.every}" if s.recompute.every > 1 else "")
        shape = f"{hf['hidden_size']}x{hf['num_hidden_layers']} V{hf['vocab_size']}"
        tokens = f"{w.microbatches}x{w.tokens}"
        return f"{self.method + rank:12}{shape:15}{tokens:8}{s.precision.wire:9}{again:12}{s.fsdp.strategy}"


def draw_run(rng: random.Random) -> Case:
    """Any of them; all steps take between a hundredth of a second and a few."""
    head_dim = rng.choice([32, 64])
    heads = rng.randint(2, 12)
    kv_heads = rng.choice([count for count in (1, 2, 3, heads) if heads % count == 0])
    hidden = heads * head_dim
    method = rng.choice(["full", "lora", "qlora"])
    tokens = rng.choice([128, 256, 384, 512, 768, 1024])
    setup = TrialSetup(
        adapter=None if method == "full" else LoraConfig(r=rng.choice([4, 8, 16, 32]), dropout=rng.choice([0.0, 0.1])),
        quant=QuantConfig() if method == "qlora" else None,
        precision=Precision(wire=rng.choice(["bfloat16", "bfloat16", "float32"])),
        fsdp=ShardPolicy(
            rng.choice(["zero3", "zero3", "zero2", "zero1", "ddp"]),
            reshard_after_forward=rng.random() < 0.7,
            prefetch_units=rng.randint(0, 2),
        ),
        recompute=RecomputeConfig(rng.choice(["none", "selective", "full"]), every=rng.randint(1, 2)),
    )
    return Case(
        method,
        {
            "model_type": "llama", "vocab_size": rng.choice([1024, 4096, 16384]), "hidden_size": hidden,
            "intermediate_size": 64 * round(hidden * rng.uniform(2, 4) / 64), "num_hidden_layers": rng.randint(2, 8),
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "tie_word_embeddings": rng.random() < 0.5,
        },
        setup,
        Workload(
            tokens=tokens,
            document_tokens=rng.choice([tokens, tokens // 2, tokens // 4, max(16, tokens // 8)]),
            microbatches=rng.randint(1, 3),
            targets=rng.choice([None, tokens // 4]),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """seconds: of a step, the median over groups in which others left the machine alone, or over all, if in none.
    foreign: what others used of the processors, by group."""

    seconds: float
    foreign: list[float]


def time_steps(trial: Trial, world: World) -> Timing:
    """Groups of steps, each from the meeting of all ranks to the next one. Two steps come before: the first learns the
    order of the blocks."""
    for _ in range(2):
        trial.step()
    steps = max(1, round(GROUP_S / float(max_over_ranks(trial.timed_step(), world))))
    load, groups = Load(), []
    for _ in range(GROUPS):
        barrier(world)
        started = time.perf_counter()
        for _ in range(steps):
            trial.step()
        barrier(world)
        groups.append(((time.perf_counter() - started) / steps, load.foreign_share()))
    quiet = [elapsed for elapsed, share in groups if share <= QUIET_SHARE]
    seconds = statistics.median(quiet or [elapsed for elapsed, _ in groups])
    return Timing(seconds, [share for _, share in groups])


def result_of(question: str, rows: list[dict[str, Any]], shares: list[float]) -> Result:
    """What the errors, planned / measured - 1, come to, printed too; `shares` of the processors were others'."""
    errors = [row["error"] for row in rows]
    sizes = sorted(abs(error) for error in errors)
    values = {
        "runs": len(sizes),
        "within_15_percent": sum(size <= 0.15 for size in sizes) / len(sizes),
        "median_error": statistics.median(sizes),
        "error_of_90_percent": sizes[int(0.9 * (len(sizes) - 1))],
        "largest_error": sizes[-1],
        "mean_signed_error": statistics.fmean(errors),
    }
    for name, value in values.items():
        print(f"{name:22}{value:8.3f}")
    conditions = {"quiet": statistics.median(shares) <= QUIET_SHARE, "foreign_share": [min(shares), max(shares)]}
    return Result(question, values, rows, conditions)


def draw_errors(figure: Any, theme: Any, rows: list[dict[str, Any]], x: str, planned: str) -> None:
    """Planned over measured seconds of each run, against `x`; between the lines the plan is off by at most 15 %."""
    figure.set_size_inches(9, 3.6)
    axes = figure.subplots()
    axes.axhspan(0.85, 1.15, color=theme.quiet, alpha=0.15, linewidth=0)
    axes.axhline(1.0, color=theme.quiet, linewidth=1)
    for ranks, colour in zip(sorted({row["ranks"] for row in rows}), theme.series, strict=False):
        shown = [row for row in rows if row["ranks"] == ranks]
        heights = [row[f"{planned}_seconds"] / row["measured_seconds"] for row in shown]
        axes.plot([row[x] for row in shown], heights, "o", color=colour, label=f"{ranks} process{'es' * (ranks > 1)}")
    axes.set_ylim(min(0.6, *axes.get_ylim()), max(1.4, *axes.get_ylim()))
    axes.set_ylabel(f"{planned} / measured")
    axes.legend(loc="lower right", ncols=4)
