"""Is a step on a GPU bound by the GPU, or by the process that launches its kernels?

    python benchmarks/host_time.py

The host's side is measured, on a processor: whole steps of the engine (hooks, buckets, autograd, optimizer, bf16), with
widths so small that arithmetic takes next to nothing; with twice the widths a step takes `wider` times as long. Its
time grows by that of a block with each layer, so a block's is the slope between 8 and 32 layers: forward and backward,
and, apart from it, the update. Calls that would launch a kernel on a GPU, all that are neither views nor allocations,
are counted and timed where they are made. What they take here is the business of CPU kernels, and a launch is not, so
for the host of a GPU

    host = measured - calls that launch + LAUNCH_S each

which leaves out what only a GPU needs (streams and events for each gather, PyTorch's flash attention) and takes this
processor for the GPU's host: an estimate. The GPU's side is arithmetic, what `minift plan` has of an H100
(minift/planner/catalog.py): no GPU was measured. NF4 weights are cut into slices on a GPU, of which small ones have
one; the host's time for more is by the number of operations, as the planner counts them.

Without recomputation, which the host launches again, too. Prints two tables, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from processes import run_ranks
from protocol import Times, stopwatch, take_turns
from results import Result, finish, parse
from torch.utils._python_dispatch import TorchDispatchMode

from minift.dist.process import World
from minift.model.config import ModelConfig
from minift.peft.lora import LoraConfig
from minift.planner.catalog import MODELS, gpu
from minift.planner.describe import describe
from minift.planner.op import Op
from minift.planner.shapes import RunShape, Workload
from minift.planner.trial import Trial, TrialSetup
from minift.planner.work import count
from minift.quant.linear import QuantConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

LAUNCH_S = 5e-6
"""Of PyTorch's dispatch, an allocation and the launch of a kernel on a GPU: not measured here."""
SETUPS = {
    "full": TrialSetup(),
    "LoRA": TrialSetup(LoraConfig(r=16)),
    "QLoRA": TrialSetup(LoraConfig(r=16), QuantConfig()),
}
COMPARED = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
DEVICE = "h100"
LAYERS = (8, 32)
TINY = Workload(tokens=32, document_tokens=16)
TOKENS = [2**exponent for exponent in range(7, 16)]
STEP_TOKENS = 8192
DOCUMENT_TOKENS = 4096


# ----------------------------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Variant:
    method: str
    widths: int
    layers: int

    def make(self, world: World) -> Trial:
        return Trial(tiny_model(self.layers, self.widths), SETUPS[self.method], TINY, world)


@dataclass(frozen=True)
class Measured:
    """Of a method, by the number of layers: seconds of steps and of their updates, and calls that would launch."""

    times: Times
    updates: dict[Variant, float]
    launches: dict[Variant, int]
    launch_seconds: dict[Variant, float]


def tiny_model(layers: int, widths: int = 1) -> ModelConfig:
    return ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64 * widths, "intermediate_size": 128 * widths,
        "num_hidden_layers": layers, "num_attention_heads": 2 * widths, "num_key_value_heads": widths,
    })  # fmt: skip


class Launches(TorchDispatchMode):
    """Calls that would launch a kernel: how many, and what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            self.seconds += time.perf_counter() - started
            self.count += 1
        return result


def measure(world: World, tell: object, rounds: int) -> Measured:
    variants = [Variant(method, widths, layers) for method in SETUPS for widths in (1, 2) for layers in LAYERS]
    trials = {variant: variant.make(world) for variant in variants}
    updates: dict[Variant, list[float]] = {variant: [] for variant in variants}

    def turn(variant: Variant, trial: Trial) -> Callable[[], float]:
        update = trial.optimizer.step

        def timed_update(*args: Any, **keywords: Any) -> None:
            updates[variant].append(stopwatch(lambda: update(*args, **keywords))())

        trial.optimizer.step = timed_update
        return stopwatch(trial.step)

    turns = {variant: turn(variant, trial) for variant, trial in trials.items()}
    take_turns(turns, 3)
    for of_variant in updates.values():
        of_variant.clear()
    times = take_turns(turns, rounds)
    launches: dict[Variant, list[Launches]] = {variant: [] for variant in variants if variant.widths == 1}
    for _ in range(max(3, rounds // 3)):
        for variant, found in launches.items():
            with Launches() as one:
                trials[variant].step()
            found.append(one)
    return Measured(
        times,
        {variant: median(seconds) for variant, seconds in updates.items()},
        {variant: found[0].count for variant, found in launches.items()},
        {variant: median(one.seconds for one in found) for variant, found in launches.items()},
    )


def of_block(method: str, value: Callable[[Variant], float], widths: int = 1) -> tuple[float, float]:
    """What a layer adds to `value`, and what is left without layers."""
    few, many = (value(Variant(method, widths, layers)) for layers in LAYERS)
    slope = (many - few) / (LAYERS[1] - LAYERS[0])
    return slope, few - LAYERS[0] * slope


def host_row(measured: Measured, method: str) -> dict[str, Any]:
    """Microseconds of a block, forward and backward, and of its update; and of what a step has once."""
    step_s, rest_s = of_block(method, measured.times.median)
    wider_s, _ = of_block(method, measured.times.median, widths=2)
    update_s, rest_of_update_s = of_block(method, measured.updates.__getitem__)
    launches, _ = of_block(method, measured.launches.__getitem__)
    launch_s, _ = of_block(method, measured.launch_seconds.__getitem__)
    on_gpu_s = step_s - update_s - launch_s + launches * LAUNCH_S
    num_ops = sum(op.count for op in block_ops(tiny_model(3), method, TINY))
    return {
        "method": method,
        "block_us": 1e6 * (step_s - update_s),
        "update_us": 1e6 * update_s,
        "once_us": 1e6 * rest_s,
        "wider": wider_s / step_s,
        "launches": launches,
        "launches_us": 1e6 * launch_s,
        "gpu_block_us": 1e6 * on_gpu_s,
        "gpu_launch_us": 1e6 * on_gpu_s / launches,
        "gpu_operation_us": 1e6 * on_gpu_s / num_ops,
    }


# ---------------------------------------------------------------------------------------------------------- arithmetic


@functools.cache
def described(config: ModelConfig, method: str) -> RunShape:
    return describe(config, SETUPS[method], world_size=1, link="nccl", workload=TINY)


def block_ops(config: ModelConfig, method: str, workload: Workload) -> list[Op]:
    """Of a block that is not the first, forward and backward."""
    block = count(replace(described(config, method), workload=workload)).units[2]
    return [*block.forward, *block.backward]


def shape(model: str) -> ModelConfig:
    """With as many blocks as it takes to have one that is neither first nor last."""
    return ModelConfig.from_hf(MODELS[model] | {"num_hidden_layers": 3})


def gpu_seconds(model: str, method: str, tokens: int) -> float:
    """Of a block, forward and backward, if it waits for nobody."""
    workload = Workload(tokens=tokens, document_tokens=min(tokens, DOCUMENT_TOKENS))
    return replace(gpu(DEVICE), call_s=0.0).seconds(block_ops(shape(model), method, workload))


def enough_tokens(model: str, method: str, host_s: float) -> int:
    """Of a microbatch with which the GPU is the slower one: the smallest number, to within a 64th."""
    tokens = 64
    while gpu_seconds(model, method, tokens) < host_s:
        tokens += tokens // 64
    return tokens


def model_row(model: str, host: dict[str, Any]) -> dict[str, Any]:
    method = host["method"]
    host_s = 1e-6 * host["gpu_operation_us"] * sum(op.count for op in block_ops(shape(model), method, TINY))
    gpu_us = {tokens: 1e6 * gpu_seconds(model, method, tokens) for tokens in TOKENS}
    return {
        "model": model,
        "method": method,
        "host_us": 1e6 * host_s,
        "gpu_us": gpu_us,
        "host_over_gpu": 1e6 * host_s / gpu_us[STEP_TOKENS],
        "enough_tokens": enough_tokens(model, method, host_s),
    }


# ------------------------------------------------------------------------------------------------------------- output


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """The host's time over the GPU's, by the tokens of a microbatch."""
    rows = [row for row in runs[-1]["rows"] if "model" in row]
    figure.set_size_inches(11, 3.6)
    for axes, method in zip(figure.subplots(1, len(SETUPS), sharey=True), SETUPS, strict=True):
        for row, colour in zip((row for row in rows if row["method"] == method), theme.series, strict=False):
            shares = [row["host_us"] / gpu_us for gpu_us in row["gpu_us"].values()]
            axes.plot(TOKENS, shares, color=colour, marker="o", markersize=3.5, label=row["model"])
        axes.axhline(1, color=theme.ink, linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="tokens of a microbatch", title=method)
        axes.set_xticks(TOKENS[::2], [str(tokens) for tokens in TOKENS[::2]])
    figure.axes[0].set_ylabel("host / H100, of a block")
    figure.axes[0].legend()
    figure.suptitle("above the line the GPU waits for the host; the GPU's side is arithmetic", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    args = parse(parser)

    (measured,) = run_ranks(1, measure, args.rounds)
    result = Result("host_time")
    result.count(measured.times)
    hosts = [host_row(measured, method) for method in SETUPS]
    print(f"{'us of the host':16}" + "".join(f"{row['method']:>10}" for row in hosts))
    for name in [name for name in hosts[0] if name != "method"]:
        print(f"{name:16}" + "".join(f"{row[name]:10.{2 if name == 'wider' else 1}f}" for row in hosts))
    models = [model_row(model, host) for model in COMPARED for host in hosts]
    heads = f"{'host':>8}{'H100':>8}{'host/H100':>11}{'tokens from which the H100 is slower':>38}"
    print(f"\n{f'us of a block, {STEP_TOKENS} tokens':22}{heads}")
    for row in models:
        print(
            f"{row['model']:14}{row['method']:8}{row['host_us']:8.0f}{row['gpu_us'][STEP_TOKENS]:8.0f}"
            f"{row['host_over_gpu']:11.2f}{row['enough_tokens']:38}"
        )
    result.rows = [*hosts, *models]
    result.values = {
        "gpu_operation_us": median(row["gpu_operation_us"] for row in hosts),
        "host_over_gpu": {f"{row['model']}, {row['method']}": row["host_over_gpu"] for row in models},
        "enough_tokens": {f"{row['model']}, {row['method']}": row["enough_tokens"] for row in models},
    }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
