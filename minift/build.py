"""THE ordered assembly of a trainable model; the only file that knows models, adapters and sharding together.

The order is not a matter of taste:

1. construct on the meta device: shapes without memory;
2. quantise: other projections in the place of dense ones, still without memory;
3. adapters (or the choice of what to train): they change the module tree and `requires_grad`, which sharding reads;
4. recompute: replaces the forward of blocks, adapters included, and adds or renames no parameter;
5. shard: cuts whatever parameters there are now, so it comes last;
6. load: each rank reads only the byte ranges of its shards, and quantises what is to be quantised on the way; adapter
   parameters are drawn from seed and name, or taken from the base weights, or from what the base computes.

No process ever holds the whole model, and nothing depends on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.earlier import read_earlier
from minift.checkpoint.initial import InitialAdapter, ResidualWeights
from minift.dist.process import World
from minift.fsdp import ShardedModel, ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import check_weights, load_config
from minift.peft.adapter import AdapterConfig
from minift.peft.freeze import set_trainable
from minift.peft.inject import adapter_parameters, init_tensor, inject
from minift.peft.names import canonical_name
from minift.precision import Precision
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.weights import QuantWeights, quantize_for
from minift.recompute import RecomputeConfig, apply_recompute
from minift.trace import Recorder


@dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from.

    path: a Hugging Face model folder (config.json, *.safetensors, tokenizer). A .gguf file is converted first with
        `minift convert`.
    adapter: a folder with an adapter (PEFT's format) that was trained on it: where this run's, which has the same
        settings, starts. Moments and steps begin anew. null: as the method starts.
    """

    path: str
    adapter: str | None = None


@dataclass(frozen=True)
class MetaModel:
    """A model after the first three steps: modules, shapes and what trains; no memory.

    quantized: full name -> projection held in 4 bits. num_parameters: of the dense model, and of adapters.
    """

    module: CausalLM
    quantized: dict[str, NF4Linear]
    trainable: list[str]
    num_parameters: int
    num_trainable_parameters: int


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
    quant: QuantConfig | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    precision: Precision,
    recompute: RecomputeConfig,
    policy: ShardPolicy,
    recorder: Recorder,
    world: World,
    seed: int,
    initial: InitialAdapter | None = None,
) -> BuiltModel:
    """Assemble as described above. With an adapter only its parameters are trained; without, those that `train` (all,
    if empty) and `freeze` say, see `peft.freeze`. `quant`: hold the base weights so; a folder that is quantised already
    is held as it is. `initial`: where the adapter starts, for a method that changes the base by it; it goes without
    `source.adapter`. ValueError for a folder or a pattern that does not fit."""
    config = load_config(source.path)
    weights = QuantWeights(source.path) if initial is None else ResidualWeights(source.path, initial)
    on_paper = construct(config, weights, adapter, quant=quant, train=train, freeze=freeze, seed=seed)
    model, quantized = on_paper.module, on_paper.quantized
    own_parameters = adapter_parameters(model)

    def dense_weight(projection: str) -> Tensor:
        if projection in quantized:
            return weights.trained_weight(projection, quantized[projection])
        shape = weights.shape(f"{projection}.weight")
        return weights.read_range(f"{projection}.weight", 0, math.prod(shape)).view(shape)

    earlier: dict[str, Tensor] = {}
    if source.adapter is not None and adapter is not None:
        assert initial is None, "an adapter has two starts"
        earlier = read_earlier(source.adapter, adapter, model, dense_weight, quantized.__contains__)

    apply_recompute(model, model.shard_units(), recompute, recorder)
    engine = shard(model, model.shard_units(), world, policy, precision, recorder)

    def base_weight(name: str, start: int, stop: int | None) -> Tensor:
        projection = canonical_name(name)
        if projection in quantized:
            return dense_weight(projection).reshape(-1)[start:stop]
        numel = math.prod(weights.shape(f"{projection}.weight"))
        return weights.read_range(f"{projection}.weight", start, numel if stop is None else stop)

    drawn: dict[str, Tensor] = {}  # the adapter parameter drawn last: a shard border may ask for its two halves

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in earlier:
            return earlier[name].reshape(-1)[start:stop]
        if name not in own_parameters:
            projection, _, part = canonical_name(name).rpartition(".")
            if projection in quantized and part != "bias":
                return weights.read_bytes(quantized[projection], f"{projection}.{part}", start, stop)
            return weights.read_range(f"{projection}.{part}", start, stop)
        if name not in drawn:
            drawn.clear()
            values = init_tensor(model, name, seed, base_weight) if initial is None else initial.read(name)
            drawn[name] = values.reshape(-1)
        return drawn[name][start:stop]

    engine.load(read)
    computed = {} if adapter is None or earlier else adapter.computed_values(model, seed)
    if computed:
        for shard_of_bucket in engine.trainable_shards():
            shard_of_bucket.write(computed)
        engine.weights_changed()
    return BuiltModel(
        model, engine, config, on_paper.trainable, on_paper.num_parameters, on_paper.num_trainable_parameters
    )


def construct(
    config: ModelConfig,
    weights: QuantWeights | None,
    adapter: AdapterConfig | None,
    *,
    quant: QuantConfig | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    seed: int = 0,
) -> MetaModel:
    """Steps 1 to 3. weights: of the folder, which are looked at and not read; None: there is none (a plan), and they
    are taken to be dense."""
    with torch.device("meta"):
        model = CausalLM(config)
    if weights is not None:
        check_weights(weights, model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = quantize_for(model, weights, quant)
    if quantized and adapter is None:
        held = "the model" if weights is None else weights.folder
        raise ValueError(f"{held} is held in 4 bits, which cannot be trained; valid: with an adapter")
    if adapter is not None:
        trainable = inject(model, adapter, seed=seed)
    else:
        trainable = set_trainable(model, train=train, freeze=freeze)
    num_parameters += sum(parameter.numel() for parameter in adapter_parameters(model).values())
    num_trainable_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return MetaModel(model, quantized, trainable, num_parameters, num_trainable_parameters)


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
