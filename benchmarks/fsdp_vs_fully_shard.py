"""How do minift's FSDP and PyTorch's `fully_shard` compare in step time and memory, on gloo, same model code on both
sides?

    python benchmarks/fsdp_vs_fully_shard.py                          # 2 ranks, bf16 wire, fp32 reduce
    python benchmarks/fsdp_vs_fully_shard.py --wire float32 --ranks 4

The model is `minift.model.CausalLM` with the shapes of SmolLM2-135M and random weights, fully trained, one document per
rank, AdamW. Time: all variants live in the same processes, take steps in turns (ABC CBA ...), and a ratio is the median
of the ratios of neighbouring steps. *compute* is the same forward, backward and update of 1/N of the weights without
any communication or sharding. The losses of the first steps must agree before anything is timed.

Memory: fresh processes per engine, short documents so that activations do not hide the engine, freed memory returned
to the system at once (MALLOC_MMAP_THRESHOLD_) so that PSS is what is alive. Peak: largest sum over the ranks during
steps 3 to 6. Transient: that, less what is held between steps. PSS, because shared pages must be counted once.

Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from processes import pss_bytes, spawn
from smollm2 import VOCAB_SIZE, loss_of, make_model
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange
from minift.precision import Precision

OPTIM = OptimConfig(lr=1e-4, weight_decay=0.0, max_grad_norm=None)
VARIANTS = ("minift", "fully_shard", "compute")
Step = Callable[[Tensor], float]  # token ids -> this rank's mean loss


# -------------------------------------------------------------------------------------------------------- the variants


def minift_step(args: argparse.Namespace, world: World) -> Step:
    model = make_model(args.layers)
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


def fully_shard_step(args: argparse.Namespace, world: World) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model(args.layers)
    mesh = init_device_mesh("cpu", (world.size,))
    # No casting of inputs: the model makes its own, in the right dtypes.
    policy = MixedPrecisionPolicy(getattr(torch, args.wire), torch.float32, cast_forward_inputs=False)
    for unit in model.shard_units():
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=tuple(OPTIM.betas), eps=OPTIM.eps, weight_decay=0.0, fused=True
    )

    def step(tokens_T: Tensor) -> float:
        loss = loss_of(model, tokens_T)
        (loss / (len(tokens_T) - 1)).backward()  # fully_shard averages over ranks
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) / (len(tokens_T) - 1)

    return step


def compute_step(args: argparse.Namespace, world: World) -> Step:
    model = make_model(args.layers).to(getattr(torch, args.wire))
    local_numel = sum(p.numel() for p in model.parameters()) // world.size
    master, grad = torch.zeros(local_numel), torch.zeros(local_numel)
    everything = [ParamRange("all", 0, local_numel, 0, (local_numel,))]
    optimizer = AdamW([FlatShard("all", master, grad, everything)], OPTIM)

    def step(tokens_T: Tensor) -> float:
        loss = loss_of(model, tokens_T)
        (loss / (len(tokens_T) - 1)).backward()
        model.zero_grad(set_to_none=True)
        optimizer.step(1.0)
        return float(loss.detach()) / (len(tokens_T) - 1)

    return step


MAKERS = {"minift": minift_step, "fully_shard": fully_shard_step, "compute": compute_step}


# ------------------------------------------------------------------------------------------------------ in the
# processes


@dataclass(frozen=True)
class Job:
    args: argparse.Namespace
    store: str
    variants: tuple[str, ...]


def start(rank: int, job: Job) -> tuple[World, dict[str, Step]]:
    torch.set_num_threads(1)
    store = dist.FileStore(job.store, job.args.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.args.ranks)
    world = World(rank, job.args.ranks, rank, torch.device("cpu"), "gloo", dist.group.WORLD)
    return world, {name: MAKERS[name](job.args, world) for name in job.variants}


def tokens_for(world: World, step: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + world.rank)
    return torch.randint(VOCAB_SIZE, (length + 1,), generator=generator)


def time_rank(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """Every variant's losses of the first steps, then seconds per step in turns."""
    world, steps = start(rank, job)
    args = job.args
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.check_steps):
        for name, step in steps.items():
            losses[name].append(step(tokens_for(world, number, args.tokens)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds):
        tokens_T = tokens_for(world, args.check_steps + round_, args.tokens)
        for name in list(steps)[:: 1 if round_ % 2 == 0 else -1]:
            dist.barrier()
            started = time.perf_counter()
            steps[name](tokens_T)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    results.put((rank, losses, seconds))


def hold_rank(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """Six short steps; tells the parent, who watches the memory, when it stands between two."""
    world, steps = start(rank, job)
    (step,) = steps.values()
    for number in range(6):
        step(tokens_for(world, number, job.args.memory_tokens))
        dist.barrier()
        results.put(("between", number))
        time.sleep(0.3)  # the parent reads what is held
    results.put(("done", rank))
    time.sleep(0.5)


# ---------------------------------------------------------------------------------------------------------- the parent


def measure_time(args: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        processes, results = spawn(
            time_rank, args.ranks, Job(args, f"{folder}/store", VARIANTS), {"OMP_NUM_THREADS": "1"}
        )
        per_rank = sorted((results.get(timeout=1800) for _ in processes), key=lambda result: result[0])
        for process in processes:
            process.join()
    # fp32: sums in another order. bf16: the same, through roundings of 2^-9 that an update may flip.
    limit = 1e-5 if args.wire == "float32" else 2e-2
    for rank, losses, _ in per_rank:
        for ours, theirs in zip(losses["minift"], losses["fully_shard"], strict=True):
            assert abs(ours - theirs) <= limit * abs(theirs), f"losses differ on rank {rank}: {losses}"
    return per_rank[0][2]


def measure_memory(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """Bytes, summed over the ranks: {"peak": during steps 3 to 6, "held": between them}."""
    with tempfile.TemporaryDirectory() as folder:
        # Blocks above 64 KiB are mapped one by one, so that freeing gives them back.
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        processes, results = spawn(hold_rank, args.ranks, Job(args, f"{folder}/store", (variant,)), environment)
        peak, held, between, done = 0, 0, 0, 0
        while done < len(processes):
            total = sum(pss_bytes(process.pid) for process in processes)
            while not results.empty():
                kind, _ = results.get()
                done, between = done + (kind == "done"), between + (kind == "between")
                if between == 2 * len(processes):
                    peak = 0
                if kind == "between" and between % len(processes) == 0:
                    held = sum(pss_bytes(process.pid) for process in processes)
            peak = max(peak, total)
        for process in processes:
            process.join()
    return {"peak": peak, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--memory-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--wire", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--policy", default="{}", help="fields of minift's ShardPolicy, as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check-steps", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    args = parser.parse_args()

    seconds = measure_time(args)
    print(f"{args.ranks} ranks, {args.tokens} tokens each, {args.wire} wire, fp32 reduce, {args.layers} layers")
    for name, values in seconds.items():
        print(f"{name:14}{statistics.median(values):8.3f} s a step (fastest {min(values):.3f})")

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    result = {
        "benchmark": "fsdp_vs_fully_shard",
        "step_time_ratio": ratio("fully_shard", "minift"),
        "overhead_vs_no_comm": ratio("minift", "compute"),
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }
    if not args.skip_memory:
        memory = {name: measure_memory(args, name) for name in ("minift", "fully_shard")}
        for name, values in memory.items():
            print(f"{name:14}peak {values['peak'] / 2**20:6.0f} MiB, held {values['held'] / 2**20:6.0f} MiB")
        ours, theirs = memory["minift"], memory["fully_shard"]
        result |= {
            "peak_memory_ratio": ours["peak"] / theirs["peak"],
            "transient_memory_ratio": (ours["peak"] - ours["held"]) / (theirs["peak"] - theirs["held"]),
            "memory_mib": {name: {k: v / 2**20 for k, v in values.items()} for name, values in memory.items()},
        }
    result |= vars(args) | {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
