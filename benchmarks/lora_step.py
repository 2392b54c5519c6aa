"""How do minift and transformers + PEFT (+ bitsandbytes) compare in time and memory of one LoRA or QLoRA step?

    python benchmarks/lora_step.py
    python benchmarks/lora_step.py --methods lora --rounds 3 --skip-memory

SmolLM2-135M's shapes with random weights, two documents of 512 tokens, rank 16 on all projections, alpha 32, no dropout
(PEFT's default), AdamW over the adapters, two threads, CPU. Both sides load the same model folder and the same adapter
folder, and take steps on the same tokens; neither uses gradient checkpointing.

    lora     bf16 base. minift: built, sharded and stepped as its trainer does (fp32 masters, bf16 compute, world of
             one, selective recompute). PEFT: its defaults, so adapters in fp32 (`autocast_adapter_dtype`), sdpa
             attention, torch's fused AdamW.
    qlora    the same over an NF4 base with double quantization. PEFT: bitsandbytes, bf16 compute. Norms and embeddings
             stay bf16: `prepare_model_for_kbit_training` would make the model slower and larger.

Where the processor has no arithmetic in 16 bits (AVX2 at most), torch multiplies bf16 matrices at 1 to 10 GFLOP/s and a
step of PEFT in bf16 takes minutes. There PEFT's base is loaded in fp32 (bitsandbytes: fp32 compute), which is the best
it has; minift keeps its bf16 and widens blocks of it (`minift/ops/matmul.py`). `--peft-dtype bfloat16` insists.

Equal losses first: over the first steps, each within LOSS_TOLERANCE of the other's. Both sides compute in bf16, whose
rounding (2^-9 relative) enters at other places; that is what the tolerance allows for.

Time: both sides live in one process and take steps in turns, ABBA; a ratio is the median of the ratios of neighbours.
"products" is the products with frozen weights alone, forward and input gradient, dense, in PEFT's dtype, by torch: what
is left of a step if everything else costs nothing. No faster step is possible without faster products, so
`*_step_ratio_limit`, PEFT's time over theirs, bounds the ratio.
Memory: a fresh process per side, blocks above 64 KiB mapped one by one so that freed memory is returned, peak resident
bytes of the process (VmHWM, reset after two steps) over three more. `held` is what is resident between steps.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from processes import spawn
from smollm2 import VOCAB_SIZE, make_model
from torch import Tensor

LOSS_TOLERANCE = 2e-4  # relative
LR = 1e-3
Step = Callable[[Tensor], float]  # token ids (documents, length) -> mean loss of the predicted tokens


@dataclass(frozen=True)
class Job:
    """What a measuring process is told."""

    folder: str
    variants: tuple[str, ...]
    layers: int
    tokens: int
    check_steps: int
    rounds: int
    peft_dtype: str  # of the base and of compute


# -------------------------------------------------------------------------------------------------------- the variants


def minift_step(job: Job, **quantization: object) -> Step:
    """quantization: what `build_model` is told about the base."""
    import numpy as np

    from minift.build import ModelSource, build_model
    from minift.checkpoint.adapters import read_config
    from minift.data.batch import pack
    from minift.data.documents import Encoded
    from minift.dist.process import init_world
    from minift.fsdp import ShardPolicy
    from minift.objectives.sft import SupervisedTokens
    from minift.optim.adamw import AdamW
    from minift.optim.config import OptimConfig
    from minift.precision import Precision
    from minift.recompute import RecomputeConfig
    from minift.step import train_step
    from minift.trace import Recorder

    world = init_world("cpu")
    recorder = Recorder(world.rank, world.device)
    built = build_model(
        ModelSource(f"{job.folder}/base"), read_config(f"{job.folder}/adapter"), precision=Precision(),
        recompute=RecomputeConfig("selective"), policy=ShardPolicy(), recorder=recorder, world=world, seed=0,
        **quantization,
    )  # fmt: skip
    optimizer = AdamW(built.engine.trainable_shards(), OptimConfig(lr=LR))

    def step(tokens_BT: Tensor) -> float:
        supervised = np.ones(tokens_BT.shape[1], bool)
        batch = pack([Encoded(tokens_T.numpy(), supervised) for tokens_T in tokens_BT])
        return train_step(
            built.module, built.engine, optimizer, SupervisedTokens(), [batch],
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=recorder,
        ).loss  # fmt: skip

    return step


def peft_step(job: Job, **quantization: object) -> Step:
    import warnings

    warnings.filterwarnings("ignore")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job.peft_dtype)
    model = AutoModelForCausalLM.from_pretrained(f"{job.folder}/base", dtype=dtype, **quantization)
    model = PeftModel.from_pretrained(model, f"{job.folder}/adapter", is_trainable=True)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, fused=True
    )

    def step(tokens_BT: Tensor) -> float:
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peft_qlora_step(job: Job) -> Step:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job.peft_dtype),
    )
    return peft_step(job, quantization_config=quantization)


def minift_qlora_step(job: Job) -> Step:
    from minift.quant.linear import QuantConfig

    return minift_step(job, quant=QuantConfig())


def products_step(job: Job) -> Step:
    """Not a step of training; returns no loss."""
    dtype, num_tokens = getattr(torch, job.peft_dtype), 2 * job.tokens
    tensors = make_model(job.layers).parameters()  # the embedding is the head's weight
    weights = [tensor.detach().to(dtype) for tensor in tensors if tensor.dim() == 2]
    widths = {width for weight in weights for width in weight.shape}
    x = {width: torch.randn(num_tokens, width).to(dtype) for width in widths}
    out = {width: torch.empty(num_tokens, width, dtype=dtype) for width in widths}

    def step(tokens_BT: Tensor) -> float:
        for weight in weights:
            torch.mm(x[weight.shape[1]], weight.T, out=out[weight.shape[0]])
        for weight in weights:
            torch.mm(x[weight.shape[0]], weight, out=out[weight.shape[1]])
        return 0.0

    return step


MAKERS: dict[str, Callable[[Job], Step]] = {
    "minift lora": minift_step,
    "peft lora": peft_step,
    "minift qlora": minift_qlora_step,
    "peft qlora": peft_qlora_step,
    "products": products_step,
}
METHODS = ("lora", "qlora")


# ---------------------------------------------------------------------------------------------------- in the processes


def tokens_of(step: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB_SIZE, (2, length), generator=generator)


def time_steps(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """Every variant's losses of the first steps, then seconds per step in turns."""
    torch.set_num_threads(2)
    steps = {name: MAKERS[name](job) for name in job.variants}
    losses = {
        name: [step(tokens_of(number, job.tokens)) for number in range(job.check_steps)] for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(job.rounds):
        tokens_BT = tokens_of(job.check_steps + round_, job.tokens)
        for name in list(steps)[:: 1 if round_ % 2 == 0 else -1]:
            started = time.perf_counter()
            steps[name](tokens_BT)
            seconds[name].append(time.perf_counter() - started)
    results.put((losses, seconds))


def hold_steps(rank: int, job: Job, results: multiprocessing.Queue) -> None:
    """Peak resident bytes over three steps that follow two, and what is resident between steps."""
    torch.set_num_threads(2)
    (name,) = job.variants
    step = MAKERS[name](job)
    for number in range(2):
        step(tokens_of(number, job.tokens))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    held = resident_bytes("VmRSS")
    for number in range(2, 5):
        step(tokens_of(number, job.tokens))
    results.put({"peak": resident_bytes("VmHWM"), "held": held})


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} line")


# ---------------------------------------------------------------------------------------------------------- the parent


def write_folders(folder: Path, layers: int) -> None:
    """base/: the model in bf16. adapter/: the values with which `build_model` begins for seed 0."""
    from minift.checkpoint.adapters import save_adapter
    from minift.model.hf import save_model
    from minift.peft.inject import adapter_parameters, inject
    from minift.peft.lora import LoraConfig

    model = make_model(layers)
    tensors = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_model(tensors.items(), model.config, folder / "base", specs)
    config = LoraConfig(r=16, alpha=32.0)
    inject(model, config, seed=0)
    parameters = {name: p.detach() for name, p in adapter_parameters(model).items()}
    save_adapter(folder / "adapter", config, parameters)


def default_peft_dtype() -> str:
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def run(target: Callable, job: Job, environment: dict[str, str]) -> object:
    (process,), results = spawn(target, 1, job, environment)
    result = results.get(timeout=3600)
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--tokens", type=int, default=512, help="per document")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check-steps", type=int, default=4)
    parser.add_argument("--peft-dtype", choices=("bfloat16", "float32"), default=default_peft_dtype())
    parser.add_argument("--skip-memory", action="store_true")
    args = parser.parse_args()

    threads = {"OMP_NUM_THREADS": "2"}
    returning = threads | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result: dict[str, object] = {"benchmark": "lora_step"}
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder), args.layers)
        for method in args.methods:
            ours, theirs = (f"{side} {method}" for side in ("minift", "peft"))
            variants = (ours, theirs, "products")
            job = Job(
                folder, variants, args.layers, args.tokens, args.check_steps, args.rounds, args.peft_dtype
            )
            losses, seconds = run(time_steps, job, threads)
            for a, b in zip(losses[ours], losses[theirs], strict=True):
                assert abs(a - b) <= LOSS_TOLERANCE * abs(b), f"losses differ: {losses}"
            result[f"{method}_step_ratio"] = statistics.median(
                b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)
            )
            result[f"{method}_step_ratio_limit"] = statistics.median(
                b / a for a, b in zip(seconds["products"], seconds[theirs], strict=True)
            )
            result[f"{method}_losses"] = {name: losses[name] for name in (ours, theirs)}
            result[f"{method}_step_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
            for name, values in seconds.items():
                print(f"{name:14}{statistics.median(values):8.3f} s a step (fastest {min(values):.3f})")
            if not args.skip_memory:
                memory = {
                    name: run(hold_steps, replace(job, variants=(name,)), returning) for name in (ours, theirs)
                }
                for name, values in memory.items():
                    print(f"{name:14}peak {values['peak'] / 2**20:6.0f} MiB, held {values['held'] / 2**20:6.0f} MiB")
                result[f"{method}_memory_ratio"] = memory[ours]["peak"] / memory[theirs]["peak"]
                result[f"{method}_memory_mib"] = {
                    name: {kind: value / 2**20 for kind, value in values.items()} for name, values in memory.items()
                }
    result |= vars(args) | {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
