"""Merge an adapter into its base model on disk: a PEFT folder and a Hugging Face folder become a Hugging Face folder.

One tensor at a time: W is read, W + ΔW is computed in fp32, rounded once to the output dtype and written. Memory is the
adapter, and a few copies of the largest weight in fp32; no model is ever built.

What a merge costs in accuracy is rounding: in bf16 a weight keeps 8 significant bits, and an update smaller than that
is lost. The report has it for every weight; `peft.drift` defines it, and the three targets that a merge may have if the
adapter was trained over a quantized base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.adapters import read_config, read_tensors
from minift.checkpoint.atomic import atomic_folder
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import load_config, save_model
from minift.model.weights import WeightReader
from minift.peft.adapter import Adapter
from minift.peft.drift import MergeReport, MergeTarget, WeightDrift, check_target, measure_drift
from minift.peft.inject import adapter_parameters, adapters, inject


def merge_adapter(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    target: MergeTarget = "original",
    as_trained: Callable[[Tensor], Tensor] | None = None,
) -> MergeReport:
    """Write the merged model to `out_folder`, which must be new or empty; it appears only when complete.

    dtype: of all weights written; None keeps each one's own.
    as_trained: what became of a base weight for training, dequantize(quantize(W)), the same shape and dtype; None: it
        was used as it is. Into this are merged "dequantized" and "requantized", and the latter is passed through it
        once more: weights that lie on the quantizer's grid, in a dense file.

    ValueError if the adapter does not fit the base (names, shapes), or adapts an LM head whose weight is the
    embedding's: the format has no place for two different ones.
    """
    check_target(target)
    as_trained = as_trained or (lambda weight: weight)
    config = load_config(base_folder)
    reader = WeightReader(base_folder)
    targets = _load_adapters(config, adapter_folder)
    if config.tie_word_embeddings and "lm_head.weight" in targets:
        raise ValueError(f"{adapter_folder} adapts lm_head, whose weight is the embedding's; merging would change both")
    names = list(reader.names())
    missing = sorted(targets.keys() - set(names))
    if missing:
        raise ValueError(f"{base_folder} lacks {len(missing)} weights that the adapter changes, e.g. {missing[0]}")
    specs = {name: (dtype or reader.dtype(name), tuple(reader.shape(name))) for name in names}
    drifts: list[WeightDrift] = []

    def merged_tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor, out_dtype = reader.read(name), specs[name][0]
            if name in targets:
                trained = as_trained(tensor)
                exact = targets[name].exact_weight(trained)
                if target == "original":
                    merged = targets[name].exact_weight(tensor).to(out_dtype)
                elif target == "dequantized":
                    merged = exact.to(out_dtype)
                else:
                    merged = as_trained(exact.to(tensor.dtype)).to(out_dtype)
                drifts.append(measure_drift(name, merged, exact, trained))
                tensor = merged
            yield name, tensor.to(out_dtype)

    with atomic_folder(Path(out_folder)) as temporary:
        save_model(merged_tensors(), config, temporary, specs, source_folder=base_folder)
    return MergeReport(target, tuple(drifts))


def _load_adapters(config: ModelConfig, adapter_folder: str | Path) -> dict[str, Adapter]:
    """Name of a base weight in its folder -> its adapter, with its parameters loaded and its base on meta."""
    with torch.device("meta"):
        model = CausalLM(config)
    inject(model, read_config(adapter_folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}
    model.load_state_dict(read_tensors(adapter_folder, shapes), strict=False, assign=True)
    return {f"{name}.weight": adapter for name, adapter in adapters(model).items()}
