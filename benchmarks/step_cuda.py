"""How fast does one GPU train with minift, in how much memory, and how does that compare with transformers + PEFT, or
with torch's `fully_shard`?

    python benchmarks/step_cuda.py                                            # Llama-3.1-8B's shape, LoRA
    python benchmarks/step_cuda.py --method qlora --recompute full
    python benchmarks/step_cuda.py --recompute full --offload-frozen '[13579]$' --peer resident  # half on the host
    python benchmarks/step_cuda.py --model llama-3.2-1b --method full --peer fully_shard

Random weights, random tokens, documents of one length, all tokens predicted, bf16 on the wire, AdamW over what is
trained; LoRA of rank 16 on all projections, alpha 32, no dropout. The peer has the same shape:

    peft         transformers with sdpa attention, adapters in fp32 (PEFT's default) under autocast to bf16, torch's
                 fused AdamW; QLoRA through bitsandbytes, where it is installed. Gradient checkpointing as minift
                 recomputes, none or full; and full where it runs out of memory without.
    fully_shard  minift's model under `fully_shard` with a block to a group, fp32 masters, bf16 compute, fused AdamW,
                 nothing recomputed
    resident     minift with nothing on the host; losses of the first step, of the same weights, must be equal

All clip gradients to a norm of 1.

Each side is a process of its own (memory is `max_memory_allocated` of steps after the first two), so its steps cannot
alternate with the other's; the processes do, `--rounds` times, and what was best is compared. Losses of equal models
are compared elsewhere (tests, `lora_step.py`): weights here are too large to be made alike in two ways.

    mfu          model FLOPs (the products, forward, input gradient and, where weights are trained, theirs, and causal
                 attention; nothing that is recomputed) over time and the card's peak by its datasheet (H100: 989
                 TFLOP/s, and so for cards that `planner.catalog` does not have)
    of_products  the same over the measured rate of an 8192³ product: how much of what the card gives is used

Rules of measuring: `protocol`. Prints a table, and one line of JSON last. Needs a GPU; `--device cpu` is for trying the
file on a small model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from results import Result, finish, parse
from torch import Tensor, nn

from minift.dist.process import init_world, shutdown
from minift.fsdp import ShardPolicy
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.optim.config import OptimConfig
from minift.peft.lora import LoraConfig
from minift.planner.catalog import MODELS, gpu, model_shape, network, this_gpu
from minift.planner.describe import describe
from minift.planner.device import Device
from minift.planner.memory import plan_memory
from minift.planner.shapes import Workload
from minift.planner.timing import time_step
from minift.planner.trial import Trial, TrialSetup
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.step import StepResult
from minift.style import label_bars, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minift.style import Theme

MAX_GRAD_NORM = 1.0
Side = tuple[Callable[[], object], dict[str, Any]]  # a step, and what else is known of the side


# -------------------------------------------------------------------------------------------------------------- sides


def minift_side(args: argparse.Namespace, device: torch.device) -> Side:
    world = init_world(device.type)
    lora = LoraConfig(r=16, alpha=32.0)
    setup = TrialSetup(
        adapter=None if args.method == "full" else lora,
        quant=QuantConfig() if args.method == "qlora" else None,
        recompute=RecomputeConfig(args.recompute),
        fsdp=ShardPolicy() if args.offload_frozen is None else ShardPolicy(
            offload_frozen=(args.offload_frozen,), prefetch_units=2
        ),
        optim=OptimConfig(weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM),
    )
    config, workload = model_shape(args.model), Workload(tokens=args.tokens, document_tokens=args.document_tokens)
    trial = Trial(config, setup, workload, world)
    link = "nccl" if device.type == "cuda" else "shared memory"
    run = describe(config, setup, world_size=1, link=link, workload=workload)
    planned_s = time_step(run, card(), network("nvlink")).seconds
    return trial.step, {"planned_bytes": plan_memory(run).peak_bytes, "planned_seconds": planned_s}


def card() -> Device:
    return gpu(this_gpu() or "h100")


def resident_side(args: argparse.Namespace, device: torch.device) -> Side:
    args.offload_frozen = None
    return minift_side(args, device)


def peft_side(args: argparse.Namespace, device: torch.device) -> Side:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    settings = dict(MODELS[args.model])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if args.method == "qlora":  # quantised as it is loaded, which is how it is done
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=how, device_map={"": device}
            )
    model = get_peft_model(model, PeftConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    if args.recompute == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    tokens_BT = random_tokens(args, device).view(-1, args.document_tokens)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, {}


def fully_shard_side(args: argparse.Namespace, device: torch.device) -> Side:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    init_world(device.type)
    with torch.device(device):
        model = CausalLM(ModelConfig.from_hf(MODELS[args.model]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.shard_units():
        fully_shard(block, mp_policy=mixed)
    fully_shard(model, mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    tokens_T = random_tokens(args, device)
    length = args.document_tokens
    positions_T = torch.arange(length, device=device).repeat(args.tokens // length)
    bounds = torch.arange(0, args.tokens + 1, length, dtype=torch.int32, device=device)

    def head(hidden_TD: Tensor, lm_head: nn.Module) -> Tensor:
        return linear_cross_entropy(hidden_TD, lm_head, tokens_T, num_targets=args.tokens)

    def step() -> None:
        (model(tokens_T, positions_T, bounds, length, head=head) / args.tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, {}


SIDES = {"minift": minift_side, "peft": peft_side, "fully_shard": fully_shard_side, "resident": resident_side}


def random_tokens(args: argparse.Namespace, device: torch.device) -> Tensor:
    return torch.randint(MODELS[args.model]["vocab_size"], (args.tokens,), device=device)


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Of one side, in this process: seconds of its steps, and its peak."""
    device = torch.device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step, about = SIDES[args.side](args, device)
    first = step()
    step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    shutdown()
    loss = first.loss if isinstance(first, StepResult) else None
    return {"seconds": median(seconds), "peak_bytes": peak_bytes, "first_loss": loss, **about}


def measured(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """`measure` of a side in a process of its own. Of PEFT with full recompute, if there is no memory for none."""
    own = [argument for argument in sys.argv[1:] if argument not in ("--write", "--busy")]
    command = [sys.executable, __file__, *own, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    recompute = args.recompute if side != "fully_shard" else "none"
    if side == "peft" and recompute == "none" and "OutOfMemoryError" in done.stderr:
        print("peft: out of memory unless it recomputes")
        recompute = "full"
        done = subprocess.run([*command, "--recompute", recompute], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"recompute": recompute}


def products_flops(device: torch.device) -> float:
    """Of bf16 products of this card: 8192³, the median of ten."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / median(seconds[3:])


def model_flops(config: ModelConfig, args: argparse.Namespace) -> float:
    """Of a step: 2 for each weight of a projection and the head, token and direction, and causal attention."""
    weights = config.num_layers * (
        config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        + 3 * config.hidden_size * config.intermediate_size
    ) + config.hidden_size * config.vocab_size
    directions = 3 if args.method == "full" else 2
    attention = config.num_layers * config.num_heads * config.head_dim * args.document_tokens * 2
    return args.tokens * (2 * directions * weights + 3 * attention)


def draw(figure: Figure, theme: Theme, runs: list[dict[str, Any]]) -> None:
    """Tokens a second and peak memory of every side of every run."""
    rows = [(run["parameters"], row) for run in runs for row in run["rows"]]
    figure.set_size_inches(11, 1.0 + 0.45 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [
        f"{row['side']}, {a['model']}, {a['method']}, recompute {row['recompute']}"
        + (", part on the host" if a["offload_frozen"] and row["side"] == "minift" else "")
        for a, row in rows
    ]
    colours = [theme.ours if row["side"] == "minift" else theme.theirs for _, row in rows]
    for axes, title, key in ((left, "tokens a second", "tokens_per_second"), (right, "peak, GB", "peak_gb")):
        axes.set_title(title)
        heights = [row[key] for _, row in rows]
        label_bars(axes, axes.barh(range(len(rows)), heights, color=colours), [three_digits(h) for h in heights])
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=MODELS)
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full", "offload"))
    parser.add_argument("--offload-frozen", help="blocks (regular expression) whose frozen weights wait on the host")
    parser.add_argument("--peer", default="peft", choices=("peft", "fully_shard", "resident", "none"))
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="that are timed in each process")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of a measuring process
    args = parse(parser, is_timed="--side" not in sys.argv)
    if args.side:
        print(json.dumps(measure(args)))
        return

    if args.peer == "peft" and (args.method == "full" or args.recompute not in ("none", "full")):
        raise SystemExit("PEFT is a peer of lora and qlora, with recompute none or full; others: --peer none")
    if args.peer == "fully_shard" and args.method != "full":
        raise SystemExit("fully_shard is a peer of full fine-tuning; others: --peer none")
    if args.peer == "resident" and args.offload_frozen is None:
        raise SystemExit("resident is a peer of --offload-frozen; others: --peer none")
    sides = ["minift", *([] if args.peer == "none" else [args.peer])]
    if args.peer == "peft" and args.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        sides = ["minift"]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            found[side].append(measured(args, side))

    flops, rate = model_flops(model_shape(args.model), args), products_flops(torch.device(args.device))
    result = Result("step_cuda", values={"products_tflops": rate / 1e12})
    for side, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        result.rows.append(
            {
                "side": side,
                "recompute": best["recompute"],
                "tokens_per_second": args.tokens / best["seconds"],
                "seconds": best["seconds"],
                "peak_gb": best["peak_bytes"] / 1e9,
                "mfu": flops / best["seconds"] / card().peak_flops_per_s,
                "of_products": flops / best["seconds"] / rate,
            }
        )
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in result.rows[-1].items() if not isinstance(v, str))
        print(f"{side:12}  recompute {best['recompute']}  {numbers}")
    ours = result.rows[0]
    result.values |= {
        "tokens_per_second": ours["tokens_per_second"],
        "peak_gb": ours["peak_gb"],
        "peak_over_plan": min(run["peak_bytes"] for run in found["minift"]) / found["minift"][0]["planned_bytes"],
    }
    if args.peer == "resident" and len({run["first_loss"] for runs in found.values() for run in runs}) > 1:
        raise SystemExit(f"losses of the first step differ: {found}")
    if args.device == "cuda" and this_gpu() is not None:
        result.values["time_over_plan"] = ours["seconds"] / found["minift"][0]["planned_seconds"]
    for row in result.rows[1:]:
        result.values["tokens_ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]
        result.values["memory_ratio"] = ours["peak_gb"] / max(row["peak_gb"], 1e-9)
    finish(args, result, draw)


if __name__ == "__main__":
    main()
