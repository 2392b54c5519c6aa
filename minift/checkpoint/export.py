"""What a run leaves for other tools: an adapter in PEFT's format, or the whole model as a Hugging Face folder.

What was trained is gathered from the masters, one bucket at a time, and written from there; what was not is copied from
the base folder, so that its bits do not depend on the dtype it was computed in. So no rank ever needs more memory,
beside what training holds, than the largest bucket in master dtype and a few MiB.

An export appears whole or not there, and one of an earlier state stays until the new one can take its place. For that
the disk must have room for both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from minift.checkpoint.adapters import save_adapter
from minift.checkpoint.atomic import atomic_folder, swap_in
from minift.checkpoint.fingerprint import take_fingerprint
from minift.checkpoint.initial import InitialAdapter
from minift.checkpoint.quantize import quantize_folder
from minift.fsdp.sharded import ShardedModel
from minift.model.config import ModelConfig
from minift.model.hf import save_model
from minift.model.weights import WeightReader
from minift.peft.adapter import AdapterConfig
from minift.peft.inject import to_file
from minift.peft.residual import ResidualLoraConfig
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights


class Exported(NamedTuple):
    """The folders that were written: of an adapter and the model that it is for, or of a whole model. base_quant: how
    that base is quantised when it is read; None: it is not, or it is stored so."""

    adapter: str | None = None
    base: str | None = None
    base_quant: QuantConfig | None = None
    model: str | None = None


def export_run(
    engine: ShardedModel,
    config: ModelConfig,
    adapter: AdapterConfig | None,
    base_folder: str,
    folder: Path,
    initial: InitialAdapter | None = None,
    quant: QuantConfig | None = None,
) -> Exported:
    """Write `folder/adapter` or `folder/model`. Collective.

    Weights of a whole model get the dtypes of the base folder. An adapter that changed its base where it started, at
    `initial`, is written as one for the base in `base_folder`; if it was quantised after that, as `quant` says, that is
    another model, which is written to `folder/base`. What an earlier export of this run left is replaced.
    """
    target = folder / ("model" if adapter is None else "adapter")
    fresh = target.with_name(f".{target.name}.new")
    is_main = engine.world.is_main
    if is_main:
        swap_in(fresh, target)  # what an export that was killed at the last moment had ready
    if adapter is not None:
        trained = engine.full_tensors(trainable_only=True)
        tensors = {name: tensor.cpu().clone() for name, tensor in trained if is_main}
        has_own_base = quant is not None and isinstance(adapter, ResidualLoraConfig) and adapter.quantizes_residual
        base = folder / "base" if has_own_base else Path(base_folder)
        if is_main:
            if has_own_base:
                _write_base(base, base_folder, quant, initial)
            weights, model = QuantWeights(base), engine.module

            def base_weight(name: str) -> Tensor:
                return weights.trained_weight(name, model.get_submodule(name).base)

            tensors = {name: to_file(model, name, values.float(), base_weight) for name, values in tensors.items()}
            if initial is not None and not has_own_base:
                assert isinstance(adapter, ResidualLoraConfig)
                tensors = adapter.for_original_base(tensors, initial.tensors())
                adapter = adapter.original_config()
            fingerprint = take_fingerprint(
                model,
                lambda name: weights.read(f"{name}.weight"),
                weights.stored.projections.__contains__,
                is_exact=has_own_base,
            )
            base_model = str(base.resolve())
            save_adapter(fresh, adapter, tensors, base_model=base_model, fingerprint=fingerprint, model=model)
            swap_in(fresh, target)
        is_stored_quantized = has_own_base or bool(QuantWeights(base).stored.projections)
        return Exported(str(target), str(base), base_quant=None if is_stored_quantized else quant)

    reader = WeightReader(base_folder)
    parameters = dict(engine.module.named_parameters())
    specs = {name: (reader.dtype(name), tuple(reader.shape(name))) for name in parameters}

    def tensors_to_save() -> Iterator[tuple[str, Tensor]]:
        yield from engine.full_tensors(trainable_only=True)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                yield name, reader.read(name)

    if is_main:
        with atomic_folder(fresh) as temporary:
            save_model(tensors_to_save(), config, temporary, specs, source_folder=base_folder)
        swap_in(fresh, target)
    else:
        deque(engine.full_tensors(trainable_only=True), maxlen=0)  # take part in the gathers, keep nothing
    return Exported(model=str(target))


def _write_base(target: Path, base_folder: str, quant: QuantConfig, initial: InitialAdapter) -> None:
    """What an adapter left of a model, quantised."""
    fresh = target.with_name(f".{target.name}.new")
    swap_in(fresh, target)
    quantize_folder(base_folder, fresh, quant, initial)
    swap_in(fresh, target)
