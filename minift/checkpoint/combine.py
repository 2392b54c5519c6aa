"""Several LoRA folders become one: `peft.combine` for files. The base model is not needed.

    combine_adapters(["a", "b"], "both", weights=[0.7, 0.3], how=Combination(method="svd", rank=16))

The result is a plain LoRA whose α is its rank, for every base that its parts were trained on: adapters that say that
they are for different ones are refused. Modules that only some of them adapt are combined of those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.adapters import base_model_of, read_config, read_unchecked, save_adapter
from minift.checkpoint.fingerprint import Sample, read_fingerprint
from minift.peft.combine import Combination, Update, combine
from minift.peft.lora import LoraConfig


def combine_adapters(
    folders: Sequence[str | Path],
    out_folder: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: Combination | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> LoraConfig:
    """Write the combination of the LoRA adapters in `folders` to `out_folder`, new or empty; return its settings.

    weights: a factor for each, any sign; equal ones that sum to 1 if None. dtype, max_shard_bytes: see `adapter_files`.
    ValueError names what cannot be combined: another method than LoRA, modules trained whole, adapters of different
    bases, other ranks than `how` needs.
    """
    how = how or Combination()
    if weights is None:
        weights = [1.0 / len(folders)] * len(folders)
    if not folders or len(weights) != len(folders):
        raise ValueError(f"{len(weights)} weights were given for {len(folders)} adapters; valid: one for each")
    parts = [read_updates(folder) for folder in folders]
    fingerprint = _common_fingerprint(folders)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for factors in dict.fromkeys(factors for part in parts for factors in part):
        present = [(part[factors], weight) for part, weight in zip(parts, weights, strict=True) if factors in part]
        A, B = combine(factors.module, *zip(*present, strict=True), how)
        tensors |= {factors.A: A, factors.B: B}
        ranks[factors.module] = len(A)
    base_model = base_model_of(folders[0])
    config = plain_lora(ranks)
    save_adapter(
        out_folder, config, tensors,
        base_model=base_model, fingerprint=fingerprint, dtype=dtype, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    return config


@dataclass(frozen=True)
class Factors:
    """Names of a module and of its two tensors."""

    module: str
    A: str
    B: str


def read_updates(folder: str | Path) -> dict[Factors, Update]:
    """Of a LoRA folder, fp32, with the scales of its settings. ValueError for other methods, and for damaged files."""
    config = read_config(folder)
    if type(config) is not LoraConfig or config.modules_to_save:
        what = "modules_to_save, which are weights and no updates" if config.modules_to_save else config.method
        raise ValueError(f"{folder} has {what}; valid: lora and nothing else")
    tensors = read_unchecked(folder, config, {})
    updates = {}
    for module in config.adapted_modules(tensors):
        names = next(names for names in config.parameter_sets if f"{module}.{names[0]}" in tensors)
        factors = Factors(module, *(f"{module}.{name}" for name in names))
        update = Update(tensors[factors.A], tensors[factors.B], config.scale(module))
        if {update.rank, update.B.shape[1]} != {config.rank(module)}:
            shapes = f"{tuple(update.A.shape)} and {tuple(update.B.shape)}"
            raise ValueError(f"{folder}: {module} has factors {shapes}, its rank is {config.rank(module)}")
        updates[factors] = update
    return updates


def plain_lora(ranks: Mapping[str, int]) -> LoraConfig:
    """Settings of a LoRA of these modules, with a scale of 1 everywhere."""
    largest = max(ranks.values())
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest, alpha=largest, targets=sorted(ranks), rank_pattern=others,
        alpha_pattern={pattern: float(rank) for pattern, rank in others.items()},
    )  # fmt: skip


def _common_fingerprint(folders: Sequence[str | Path]) -> dict[str, Sample] | None:
    """Of the base, if the adapters say which it is, and all the same."""
    known: dict[str, tuple[str | Path, Sample]] = {}
    for folder in folders:
        for name, sample in (read_fingerprint(folder) or {}).items():
            other, earlier = known.setdefault(name, (folder, sample))
            if not earlier.could_be(sample):
                raise ValueError(f"{other} and {folder} were trained on different bases: {name} has other values")
    return {name: sample for name, (_, sample) in known.items()} or None
