"""What a run has found out about its adapter before the first step: ranks, and A₀ and B₀ of `peft.residual`.

It is kept in the run folder, so that a run that goes on has the same base, and an export can say where it began:

    ranks.json             rank_pattern and alpha_pattern, as settings
    factors.safetensors    {in-memory name of an adapter parameter: A₀ or B₀}, fp32, rounded to what compute reads;
                           not there for a method that starts as LoRA does
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minift.checkpoint.atomic import atomic_folder
from minift.peft.lora import LoraConfig
from minift.peft.residual import FACTORS, starts_as
from minift.quant.linear import NF4Linear
from minift.quant.weights import QuantWeights

_RANKS, _TENSORS = "ranks.json", "factors.safetensors"


class InitialAdapter:
    """As it lies in `folder`. Tensors are read when they are asked for."""

    def __init__(self, folder: Path, config: LoraConfig) -> None:
        if not (folder / _RANKS).is_file():
            raise ValueError(f"{folder} is gone, which says how this run's base was changed; give another --run_dir")
        patterns = json.loads((folder / _RANKS).read_text(encoding="utf-8"))
        self.config = replace(config, allocate="none", **patterns)
        """The settings, with the ranks that were found."""
        self._file = folder / _TENSORS

    @property
    def has_factors(self) -> bool:
        return self._file.is_file()

    def read(self, name: str) -> Tensor:
        """The initial value of the adapter parameter `name`."""
        with safe_open(self._file, "pt") as file:
            return file.get_tensor(starts_as(name))

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        with safe_open(self._file, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def names(self) -> list[str]:
        with safe_open(self._file, "pt") as file:
            return list(file.keys())


def save_initial(folder: Path, config: LoraConfig, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write a new folder. config: with the ranks that were found. factors: {name of a projection: (A₀, B₀)}."""
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    tensors = {
        f"{name}.{local_name}": values.contiguous()
        for name, pair in factors.items()
        for local_name, values in zip(FACTORS, pair, strict=True)
    }
    with atomic_folder(folder) as temporary:
        (temporary / _RANKS).write_text(json.dumps(patterns, indent=1) + "\n", encoding="utf-8")
        if tensors:
            save_file(tensors, temporary / _TENSORS)


class ResidualWeights(QuantWeights):
    """The weights of a folder, less s B₀ A₀ where an adapter has that: fp32 there, rounded by nobody yet. Projections
    in 4 bits hold that, too, or the weights as they are: as the method says."""

    def __init__(self, folder: str | Path, initial: InitialAdapter) -> None:
        super().__init__(folder)
        self._initial = initial
        self._whole = QuantWeights(folder)
        self._changed = {f"{name.removesuffix(f'.{FACTORS[0]}')}.weight" for name in initial.names()}

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        values = super().read_range(name, start, stop)
        if name not in self._changed or start == stop:
            return values
        projection = name.removesuffix(".weight")
        A_RI, B_OR = (self._initial.read(f"{projection}.{local_name}").double() for local_name in FACTORS)
        first = start // A_RI.shape[1]
        last = -(-stop // A_RI.shape[1])
        # In fp64, so that the bits do not depend on which rows a rank happens to ask for.
        taken = (B_OR[first:last] @ A_RI).view(-1)[start - first * A_RI.shape[1] :][: stop - start]
        return (values.double() - self._initial.config.scale(projection) * taken).to(torch.float32)

    def read_bytes(self, linear: NF4Linear, name: str, start: int, stop: int) -> Tensor:
        if self._initial.config.quantizes_residual:
            return super().read_bytes(linear, name, start, stop)
        return self._whole.read_bytes(linear, name, start, stop)
