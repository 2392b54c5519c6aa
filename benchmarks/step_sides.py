"""What `lora_step.py` compares: one training step of minift, one of transformers + PEFT (+ bitsandbytes), and bare
matrix products, all made from the same folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from smollm2 import make_model
from torch import Tensor

from minift.build import ModelSource, build_model
from minift.checkpoint.adapters import read_config, save_adapter
from minift.data.batch import pack
from minift.data.documents import Encoded
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.model.hf import save_model
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.peft.inject import adapter_parameters, inject
from minift.peft.lora import LoraConfig
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from minift.step import train_step
from minift.trace import Recorder

METHODS = ("lora", "qlora", "full")
LR = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4}
Step = Callable[[Tensor], float]  # token ids (documents, length) -> mean loss of the predicted tokens


@dataclass(frozen=True)
class Job:
    """What a measuring process is told."""

    folder: str
    method: str
    sides: tuple[str, ...]
    layers: int
    tokens: int
    check_steps: int
    rounds: int
    peft_dtype: str  # of the base and of compute


def write_folders(folder: Path, layers: int) -> None:
    """base/: the model in bf16. adapter/: the values with which `build_model` begins for seed 0."""
    model = make_model(layers)
    tensors = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_model(tensors.items(), model.config, folder / "base", specs)
    config = LoraConfig(r=16, alpha=32.0)
    inject(model, config, seed=0)
    parameters = {name: p.detach() for name, p in adapter_parameters(model).items()}
    save_adapter(folder / "adapter", config, parameters)


def minift_step(job: Job, world: World) -> Step:
    """Built, sharded and stepped as minift's trainer does."""
    recorder = Recorder(world.rank, world.device)
    built = build_model(
        ModelSource(f"{job.folder}/base"), None if job.method == "full" else read_config(f"{job.folder}/adapter"),
        quant=QuantConfig() if job.method == "qlora" else None, precision=Precision(),
        recompute=RecomputeConfig(), policy=ShardPolicy(), recorder=recorder, world=world, seed=0,
    )  # fmt: skip
    optimizer = AdamW(built.engine.trainable_shards(), OptimConfig(lr=LR[job.method], weight_decay=0.0))

    def step(tokens_BT: Tensor) -> float:
        supervised = np.ones(tokens_BT.shape[1], bool)
        batch = pack([Encoded(tokens_T.numpy(), supervised) for tokens_T in tokens_BT])
        return train_step(
            built.module, built.engine, optimizer, SupervisedTokens(), [batch],
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=recorder,
        ).loss  # fmt: skip

    return step


def peft_step(job: Job, world: World) -> Step:
    """The best settings of each: sdpa attention, torch's fused AdamW, adapters in fp32 (PEFT's default). Full
    fine-tuning: fp32 weights, and products in `peft_dtype` by autocast."""
    import warnings

    warnings.filterwarnings("ignore")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, job.peft_dtype)
    how = {"dtype": torch.float32 if job.method == "full" else dtype}
    if job.method == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(f"{job.folder}/base", **how)
    if job.method != "full":
        model = PeftModel.from_pretrained(model, f"{job.folder}/adapter", is_trainable=True)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR[job.method], weight_decay=0.0, fused=True)
    is_mixed = job.method == "full" and dtype != torch.float32

    def step(tokens_BT: Tensor) -> float:
        with torch.autocast("cpu", dtype, enabled=is_mixed):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def products_step(job: Job, world: World) -> Step:
    """The products with the model's weights alone, dense, by torch: forward, input gradient and, where weights are
    trained, theirs. Not a step of training; returns no loss."""
    dtype, num_tokens = getattr(torch, job.peft_dtype), 2 * job.tokens
    tensors = make_model(job.layers).parameters()  # the embedding is the head's weight
    weights = [tensor.detach().to(dtype) for tensor in tensors if tensor.dim() == 2]
    widths = {width for weight in weights for width in weight.shape}
    x = {width: torch.randn(num_tokens, width).to(dtype) for width in widths}
    out = {width: torch.empty(num_tokens, width, dtype=dtype) for width in widths}
    gradients = {weight.shape: torch.empty_like(weight) for weight in weights} if job.method == "full" else {}

    def step(tokens_BT: Tensor) -> float:
        for weight in weights:
            torch.mm(x[weight.shape[1]], weight.T, out=out[weight.shape[0]])
        for weight in weights:
            torch.mm(x[weight.shape[0]], weight, out=out[weight.shape[1]])
            if gradients:
                torch.mm(x[weight.shape[0]].T, x[weight.shape[1]], out=gradients[weight.shape])
        return 0.0

    return step


SIDES: dict[str, Callable[[Job, World], Step]] = {"minift": minift_step, "peft": peft_step, "products": products_step}
