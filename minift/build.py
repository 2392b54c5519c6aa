"""THE ordered assembly of a trainable model; the only file that knows models, adapters and sharding together.

The order is not a matter of taste:

1. construct on the meta device: shapes without memory;
2. adapters (or the choice of what to train): they change the module tree and `requires_grad`, which sharding reads;
3. recompute: replaces the forward of blocks, adapters included, and adds or renames no parameter;
4. shard: cuts whatever parameters there are now, so it comes last;
5. load: each rank reads only the byte ranges of its shards; adapter parameters are drawn from (seed, name).

No process ever holds the whole model, and nothing depends on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import check_weights, load_config
from minift.model.weights import WeightReader
from minift.peft.adapter import AdapterConfig
from minift.peft.freeze import set_trainable
from minift.peft.inject import adapter_parameters, init_tensor, inject
from minift.peft.names import canonical_name
from minift.precision import Precision
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder


@dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from.

    path: a Hugging Face model folder (config.json, *.safetensors, tokenizer). A .gguf file is converted first with
        `minift convert`.
    """

    path: str


@dataclass(frozen=True)
class BuiltModel:
    """A sharded model, loaded and ready to train."""

    module: CausalLM
    engine: ShardedModel
    config: ModelConfig
    trainable: list[str]
    num_parameters: int
    num_trainable_parameters: int


def build_model(
    source: ModelSource,
    adapter: AdapterConfig | None,
    *,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    precision: Precision,
    recompute: RecomputeConfig,
    policy: ShardPolicy,
    recorder: Recorder,
    world: World,
    seed: int,
) -> BuiltModel:
    """Assemble as described above. With an adapter only its parameters are trained; without, those that `train` (all,
    if empty) and `freeze` say, see `peft.freeze`. ValueError for a folder or a pattern that does not fit."""
    config = load_config(source.path)
    with torch.device("meta"):
        model = CausalLM(config)
    reader = WeightReader(source.path)
    check_weights(reader, model)
    if adapter is not None:
        trainable = inject(model, adapter, seed=seed)
    else:
        trainable = set_trainable(model, train=train, freeze=freeze)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    own_parameters = adapter_parameters(model).keys()

    apply_recompute(model, model.shard_units(), recompute, recorder)
    engine = shard(model, model.shard_units(), world, policy, precision, recorder)

    initial: dict[str, Tensor] = {}  # the adapter parameter drawn last: a shard border may ask for its two halves

    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in own_parameters:
            return reader.read_range(canonical_name(name), start, stop)
        if name not in initial:
            initial.clear()
            initial[name] = init_tensor(model, name, seed).reshape(-1)
        return initial[name][start:stop]

    engine.load(read)
    return BuiltModel(model, engine, config, trainable, sum(sizes.values()), sum(sizes[name] for name in trainable))


def base_fingerprint(folder: str | Path) -> dict[str, str]:
    """What identifies the base model of a checkpoint: sha256 of config.json and of size and ends of each weight file.

    Hashing all bytes of a 100 GB model at every start would cost minutes; another model almost surely differs here.
    """
    prints = {}
    for path in sorted(Path(folder).glob("*.safetensors")) + [Path(folder) / "config.json"]:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest = hashlib.sha256(str(size).encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
        prints[path.name] = digest.hexdigest()
    return prints
