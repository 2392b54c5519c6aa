"""Merge an adapter into its base model on disk: a PEFT folder and a Hugging Face folder become a Hugging Face folder.

One tensor at a time: W is read, W + ΔW is computed in fp32, rounded once to the output dtype and written. Memory is the
adapter, and a few copies of the largest weight in fp32; no model is ever built.

What a merge costs in accuracy is the rounding: in bf16 a weight keeps 8 significant bits, and an update smaller than
that is lost. The report gives the rounding error of each written weight W' in units of its update, in Frobenius norms:

    lost_ratio = ‖W' - (W + ΔW)‖ / ‖ΔW‖

0.01 means that 1 % of the update was replaced by noise; 0 that nothing was rounded after the fp32 sum. It says nothing
about logits; for those, run both models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from minift.peft.inject import adapter_parameters, adapters, inject


@dataclass(frozen=True)
class WeightDrift:
    """What rounding did to one merged weight; Frobenius norms."""

    name: str
    update_norm: float
    rounding_norm: float

    @property
    def lost_ratio(self) -> float:
        """Rounding error in units of the update; 0 if nothing was rounded away, even from an update of zero."""
        if self.rounding_norm == 0.0:
            return 0.0
        return self.rounding_norm / self.update_norm if self.update_norm > 0.0 else float("inf")


@dataclass(frozen=True)
class MergeReport:
    """One `WeightDrift` per merged weight, in the order of the file."""

    drifts: tuple[WeightDrift, ...]

    def __str__(self) -> str:
        worst = max(self.drifts, key=lambda drift: drift.lost_ratio)
        mean = sum(drift.lost_ratio for drift in self.drifts) / len(self.drifts)
        return (
            f"merged {len(self.drifts)} weights; rounding error / update: mean {mean:.2%}, "
            f"largest {worst.lost_ratio:.2%} ({worst.name})"
        )


def merge_adapter(
    base_folder: str | Path, adapter_folder: str | Path, out_folder: str | Path, dtype: torch.dtype | None = None
) -> MergeReport:
    """Write the merged model to `out_folder`, which must be new or empty; it appears only when complete.

    `dtype` of all weights written; None keeps each one's own. ValueError if the adapter does not fit the base (names,
    shapes), or adapts an LM head whose weight is the embedding's: the format has no place for two different ones.
    """
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
                exact = targets[name].exact_weight(tensor)
                merged = exact.to(out_dtype)
                drifts.append(WeightDrift(name, _distance(exact, tensor), _distance(merged, exact)))
                tensor = merged
            yield name, tensor.to(out_dtype)

    with atomic_folder(Path(out_folder)) as temporary:
        save_model(merged_tensors(), config, temporary, specs, source_folder=base_folder)
    return MergeReport(tuple(drifts))


def _load_adapters(config: ModelConfig, adapter_folder: str | Path) -> dict[str, Adapter]:
    """Name of a base weight in its folder -> its adapter, with its parameters loaded and its base on meta."""
    with torch.device("meta"):
        model = CausalLM(config)
    inject(model, read_config(adapter_folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}
    model.load_state_dict(read_tensors(adapter_folder, shapes), strict=False, assign=True)
    return {f"{name}.weight": adapter for name, adapter in adapters(model).items()}


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ in the Frobenius norm; the difference is fp32 (exact enough: both are close), the sum fp64."""
    return torch.linalg.vector_norm(a.float() - b.float(), dtype=torch.float64).item()
