"""Models with adapters, put together as `minift.build` does it, over the transport and in the precision of a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.initial import InitialAdapter, ResidualWeights
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.fsdp.sharded import connect
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config, save_model
from minift.objectives.cross_entropy import linear_cross_entropy
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import adapter_parameters, init_tensor, inject
from minift.peft.lora import LoraConfig
from minift.peft.names import canonical_name
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights, quantize_for
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder

LORA = LoraConfig(r=4, alpha=8.0)
FP32 = Precision(wire="float32")
BF16 = Precision(wire="bfloat16")
VOCAB_SIZE = 97

LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 200,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
"""Its rows are no whole blocks of 64."""

QWEN2 = LLAMA | {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False,
    "use_sliding_window": False,
}  # fmt: skip
"""Rows are whole blocks, as in every model that people use, and q, k, v have biases."""


def write_model(folder: Path, config: dict) -> Path:
    """Random, biases too; fp32."""
    model_config = ModelConfig.from_hf(config)
    model = CausalLM(model_config)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    specs = {name: (torch.float32, tuple(p.shape)) for name, p in model.named_parameters()}
    save_model(((name, p.detach()) for name, p in model.named_parameters()), model_config, folder, specs)
    return folder


def assemble(
    folder: Path,
    quant: QuantConfig | None,
    world: World,
    policy: ShardPolicy,
    recompute: str = "none",
    connect=connect,
    precision: Precision = FP32,
    adapter: AdapterConfig = LORA,
    values: Callable[[CausalLM, str], Tensor] | None = None,
    start: InitialAdapter | None = None,
) -> tuple[CausalLM, ShardedModel]:
    """values: of the adapter parameter called so; None: `initial`. start: by which the base is changed."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    weights = QuantWeights(folder) if start is None else ResidualWeights(folder, start)
    quantized = quantize_for(model, weights, quant)
    inject(model, adapter, seed=2)
    own = adapter_parameters(model).keys()
    recorder = Recorder(world.rank, world.device)
    apply_recompute(model, model.shard_units(), RecomputeConfig(recompute), recorder)
    engine = shard(model, model.shard_units(), world, policy, precision, recorder, connect)

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in own:
            return (values or initial)(model, name).reshape(-1)[start:stop]
        projection, _, part = canonical_name(name).rpartition(".")
        if projection in quantized and part != "bias":
            return weights.read_bytes(quantized[projection], f"{projection}.{part}", start, stop)
        return weights.read_range(f"{projection}.{part}", start, stop)

    engine.load(read)
    return model, engine


def initial(model: CausalLM, name: str) -> Tensor:
    """B starts at random too: with B = 0 the gradient of A would be 0."""
    if "lora_B" not in name:
        return init_tensor(model, name, seed=2)
    shape = model.get_parameter(name).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.1


def loss_of(model: CausalLM, rank: int, num_tokens: int) -> Tensor:
    """Of two packed documents. The seed of the masks of dropout is the rank's, too."""
    torch.manual_seed(rank)
    generator = torch.Generator().manual_seed(rank)
    tokens_T = torch.randint(VOCAB_SIZE, (num_tokens + rank + 1,), generator=generator)
    length = len(tokens_T) - 1
    first = length // 3
    positions_T = torch.cat([torch.arange(first), torch.arange(length - first)])
    bounds = torch.tensor([0, first, length], dtype=torch.int32)
    return model(
        tokens_T[:-1], positions_T, bounds, length - first,
        head=lambda hidden_TD, lm_head: linear_cross_entropy(hidden_TD, lm_head, tokens_T[1:]),
    )  # fmt: skip
