"""How do minift's FSDP and PyTorch's `fully_shard` and DDP compare in step time and memory, on gloo, same model code on
all sides?

    python benchmarks/fsdp_vs_fully_shard.py                          # 2 ranks, bf16 wire, fp32 reduce
    python benchmarks/fsdp_vs_fully_shard.py --wire float32 --ranks 4
    python benchmarks/fsdp_vs_fully_shard.py --ddp --layers 10 --vocab 8192 --ranks 8    # whole copies must fit

The model is `minift.model.CausalLM` with the shapes of SmolLM2-135M and random weights, fully trained, one document per
rank, AdamW. All variants live in the same processes and take steps in turns. *compute* is the same forward, backward
and update of 1/N of the weights without any communication or sharding. The losses of the first steps must agree before
anything is timed. DDP: with a bf16 wire the model is bf16, gradients are reduced so, and fp32 masters are updated and
copied back.

Memory: fresh processes per engine, short documents so that activations do not hide the engine. Peak: largest PSS,
summed over the ranks, during steps 3 to 6. Transient: that, less what is held between steps.

Rules of measuring: `protocol`. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from processes import KEEPING, RETURNING, Ranks, run_ranks
from protocol import Times, Turn, check_losses, stopwatch, take_turns
from results import Result, finish, parse
from smollm2 import VOCAB_SIZE, loss_of, make_model
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange
from minift.precision import Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

OPTIM = OptimConfig(lr=1e-4, weight_decay=0.0, max_grad_norm=None)
Step = Callable[[Tensor], float]  # token ids -> this rank's mean loss
Tell = Callable[[str], None]


# -------------------------------------------------------------------------------------------------------- the variants


def minift_step(args: argparse.Namespace, world: World) -> Step:
    model = make_model(args.layers, args.vocab)
    policy = ShardPolicy(**json.loads(args.policy))
    engine = shard(model, model.shard_units(), world, policy, Precision(wire=args.wire, reduce="float32"))
    optimizer = AdamW(engine.trainable_shards(), OPTIM)

    def step(tokens_T: Tensor) -> float:
        loss = loss_of(model, tokens_T)
        (loss / (world.size * (len(tokens_T) - 1))).backward()
        optimizer.step(1.0)
        engine.weights_changed()
        engine.clear_gradients()
        return float(loss.detach()) / (len(tokens_T) - 1)

    return step


def peer_step(model: nn.Module, update: Callable[[], None]) -> Step:
    """Of what averages gradients over the ranks by itself."""

    def step(tokens_T: Tensor) -> float:
        loss = loss_of(model, tokens_T)
        (loss / (len(tokens_T) - 1)).backward()
        update()
        return float(loss.detach()) / (len(tokens_T) - 1)

    return step


def fully_shard_step(args: argparse.Namespace, world: World) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model(args.layers, args.vocab)
    mesh = init_device_mesh("cpu", (world.size,))
    # No casting of inputs: the model makes its own, in the right dtypes.
    policy = MixedPrecisionPolicy(getattr(torch, args.wire), torch.float32, cast_forward_inputs=False)
    for unit in model.shard_units():
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch_adamw(list(model.parameters()))

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peer_step(model, update)


def ddp_step(args: argparse.Namespace, world: World) -> Step:
    model = make_model(args.layers, args.vocab).to(getattr(torch, args.wire))
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in parameters] if args.wire == "bfloat16" else parameters
    optimizer = torch_adamw(masters)
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def update() -> None:
        if masters is not parameters:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = parameter.grad.float()
        optimizer.step()
        if masters is not parameters:
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_([p.data for p in parameters], [m.data for m in masters])
        ddp.zero_grad(set_to_none=True)

    return peer_step(ddp, update)


def compute_step(args: argparse.Namespace, world: World) -> Step:
    model = make_model(args.layers, args.vocab).to(getattr(torch, args.wire))
    local_numel = sum(p.numel() for p in model.parameters()) // world.size
    master, grad = torch.zeros(local_numel), torch.zeros(local_numel)
    everything = [ParamRange("all", 0, local_numel, 0, (local_numel,))]
    optimizer = AdamW([FlatShard("all", master, grad, everything)], OPTIM)

    def update() -> None:
        model.zero_grad(set_to_none=True)
        optimizer.step(1.0)

    return peer_step(model, update)


def torch_adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """PyTorch's fastest."""
    return torch.optim.AdamW(
        parameters, lr=OPTIM.lr, betas=tuple(OPTIM.betas), eps=OPTIM.eps, weight_decay=0.0, fused=True
    )


MAKERS = {"minift": minift_step, "fully_shard": fully_shard_step, "ddp": ddp_step, "compute": compute_step}
Job = tuple[argparse.Namespace, tuple[str, ...]]


# --------------------------------------------------------------------------------------------------- in the processes


def tokens_for(args: argparse.Namespace, world: World, step: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + world.rank)
    return torch.randint(args.vocab, (length + 1,), generator=generator)


def time_rank(world: World, tell: Tell, job: Job) -> Times:
    """Seconds per step in turns, after every variant's first losses were found equal."""
    args, variants = job
    steps = {name: MAKERS[name](args, world) for name in variants}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.check_steps):
        for name, step in steps.items():
            losses[name].append(step(tokens_for(args, world, number, args.tokens)))
    del losses["compute"]  # which updates nothing that it computes with
    # fp32: sums in another order. bf16: the same, through roundings of 2^-9 that an update may flip.
    check_losses(losses, 1e-5 if args.wire == "float32" else 2e-2)

    def turn(step: Step) -> Turn:
        numbers = itertools.count(args.check_steps)
        return stopwatch(lambda: step(tokens_for(args, world, next(numbers), args.tokens)), dist.barrier)

    return take_turns({name: turn(step) for name, step in steps.items()}, args.rounds)


def hold_rank(world: World, tell: Tell, job: Job) -> None:
    """Six short steps; the parent watches the memory during and between them."""
    args, (variant,) = job
    step = MAKERS[variant](args, world)
    for number in range(6):
        tell("warm-up" if number < 2 else "step")
        dist.barrier()
        step(tokens_for(args, world, number, args.memory_tokens))
        dist.barrier()
        tell("held" if number >= 2 else "warm-up")
        time.sleep(0.3)  # the parent reads what is held
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------- the parent


def measure_memory(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """MiB, summed over the ranks: {"peak": during steps 3 to 6, "held": between them}."""
    with Ranks(args.ranks, hold_rank, (args, (variant,)), RETURNING) as ranks:
        peaks = ranks.watch()
        ranks.results()
    return {"peak": max(peaks["step"], peaks["held"]) / 2**20, "held": peaks["held"] / 2**20}


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Step time and memory against the number of ranks, of the model of which there are most."""
    by_model: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["parameters"]["ranks"]):
        if "memory_mib" in run["values"]:
            by_model[tuple(run["parameters"][key] for key in ("layers", "vocab", "wire", "ddp"))].append(run)
    runs = max(by_model.values(), key=len, default=[])
    left, right = figure.subplots(1, 2)
    ranks = [str(run["parameters"]["ranks"]) for run in runs]
    colours = {"minift": theme.ours, "fully_shard": theme.theirs, "ddp": theme.series[2], "compute": theme.quiet}
    for name, colour in colours.items() if runs else []:
        if name not in runs[0]["values"]["step_seconds"]:
            continue
        style = {"color": colour, "marker": "o", "markersize": 5, "linestyle": ":" if name == "compute" else "-"}
        left.plot(ranks, [run["values"]["step_seconds"][name] for run in runs], label=name, **style)
        if name in runs[0]["values"]["memory_mib"]:
            peaks = [run["values"]["memory_mib"][name]["peak"] / run["parameters"]["ranks"] for run in runs]
            right.plot(ranks, peaks, label=name, **style)
    left.set(title="seconds a step (all ranks on the same cores)", xlabel="ranks", ylim=(0, None))
    right.set(title="peak memory per rank, MiB", xlabel="ranks", ylim=(0, None))
    left.legend(loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--memory-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    parser.add_argument("--wire", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--policy", default="{}", help="fields of minift's ShardPolicy, as JSON")
    parser.add_argument("--ddp", action="store_true", help="DDP too, which holds everything on each rank")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check-steps", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    args = parse(parser)

    engines = ("minift", "fully_shard") + (("ddp",) if args.ddp else ())
    times = run_ranks(args.ranks, time_rank, (args, (*engines, "compute")), KEEPING)[0]
    print(f"{args.ranks} ranks, {args.tokens} tokens each, {args.wire} wire, fp32 reduce, {args.layers} layers")
    for name in times.seconds:
        print(f"{name:14}{times.median(name):8.3f} s a step (fastest {times.fastest(name):.3f})")
    result = Result("fsdp_vs_fully_shard")
    result.count(times)
    result.values = {
        "step_time_ratio": times.ratio("fully_shard", "minift").median,
        "overhead_vs_no_comm": times.ratio("minift", "compute").median,
        "step_seconds": {name: times.median(name) for name in times.seconds},
    }
    if args.ddp:
        result.values["step_time_ratio_ddp"] = times.ratio("ddp", "minift").median
    if not args.skip_memory:
        memory = {name: measure_memory(args, name) for name in engines}
        for name, mib in memory.items():
            print(f"{name:14}peak {mib['peak']:6.0f} MiB, held {mib['held']:6.0f} MiB, of all ranks")
        ours, theirs = memory["minift"], memory["fully_shard"]
        result.values |= {
            "peak_memory_ratio": ours["peak"] / theirs["peak"],
            "transient_memory_ratio": (ours["peak"] - ours["held"]) / (theirs["peak"] - theirs["held"]),
            "memory_mib": memory,
        }
    finish(args, result, draw)


if __name__ == "__main__":
    main()
