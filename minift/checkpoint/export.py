"""What a run leaves for other tools: an adapter in PEFT's format, or the whole model as a Hugging Face folder.

Both are gathered from the fp32 masters, one bucket of parameters in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from minift.checkpoint.adapters import save_adapter
from minift.fsdp.sharded import ShardedModel
from minift.model.config import ModelConfig
from minift.model.hf import save_model
from minift.model.weights import WeightReader
from minift.peft.adapter import AdapterConfig


def export_run(
    engine: ShardedModel, config: ModelConfig, adapter: AdapterConfig | None, base_folder: str, folder: Path
) -> tuple[str | None, str | None]:
    """Write `folder/adapter` or `folder/model` and return (adapter folder, model folder), one of them None. Collective.

    Weights of a whole model get the dtypes of the base folder. What an earlier export of this run left is replaced.
    """
    target = folder / ("model" if adapter is None else "adapter")
    if engine.world.is_main:
        shutil.rmtree(target, ignore_errors=True)
    if adapter is not None:
        tensors = {name: tensor.cpu().clone() for name, tensor in engine.full_tensors(trainable_only=True)}
        if engine.world.is_main:
            save_adapter(target, adapter, tensors, base_model=str(Path(base_folder).resolve()))
        return str(target), None

    reader = WeightReader(base_folder)
    dtypes = {name: reader.dtype(name) for name in reader.names()}
    specs = {name: (dtypes[name], tuple(reader.shape(name))) for name, _ in engine.module.named_parameters()}

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in engine.full_tensors():
            yield name, tensor.to("cpu", dtypes[name])

    if engine.world.is_main:
        save_model(converted(), config, target, specs, source_folder=base_folder)
    else:
        for _ in engine.full_tensors():
            pass  # take part in the gathers
    return None, str(target)
