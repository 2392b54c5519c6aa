"""Rows of the test matrix for methods that start where the base says: it is asked, as a run asks it.

What they compute is W x + s (B A - B₀ A₀) x in fp64, with A₀ and B₀ as they lie in the run's folder; where the residual
is quantised, W x + s B A x, with W as it is dequantised from the base that is exported.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minift.build import ModelSource
from minift.checkpoint.initial import InitialAdapter
from minift.checkpoint.quantize import quantize_folder
from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.model.decoder import CausalLM
from minift.objectives.sft import SupervisedTokens
from minift.peft.inject import inject
from minift.peft.lora import LoraConfig
from minift.peft.residual import ResidualLoraConfig, starts_as
from minift.quant.linear import QuantConfig
from minift.quant.model import load_model
from minift.recompute import RecomputeConfig
from minift.start.prepare import prepare_start
from tests.integration.assembly import BF16, FP32, VOCAB_SIZE, assemble
from tests.peft.rows import LORA_OWN, Formula, Row
from tests.start.first_batches import first_steps

ALONE = World(0, 1, 0, torch.device("cpu"), "gloo", None)


class ResidualRow(Row):
    def started(self, folder: Path, start: Path) -> ResidualRow:
        if not start.exists():
            prepare_start(
                start, self.config, first_steps(ALONE, VOCAB_SIZE), source=ModelSource(str(folder)), quant=self.quant,
                objective=SupervisedTokens(), precision=FP32, recompute=RecomputeConfig(), world=ALONE, seed=0,
            )  # fmt: skip
            if self.quant is not None:
                quantize_folder(folder, self.base(folder, start), self.quant, InitialAdapter(start, self.config))
        return replace(self, initial=InitialAdapter(start, self.config))

    def base(self, folder: Path, start: Path) -> Path:
        return folder if self.quant is None else start / "base"

    def values(self, model: CausalLM, name: str) -> Tensor:
        is_kept = starts_as(name) != name
        return self.initial_values(model, name) if is_kept else super().values(model, name)

    def initial_values(self, model: CausalLM, name: str) -> Tensor:
        return self.initial.read(name)

    def as_formulas(self, model: CausalLM, own: dict[str, Tensor]) -> None:
        of_base = 1.0 if self.quant is None else 0.0  # where it is quantised, it is without them
        before = {f"{name}, initial": of_base * values.double() for name, values in self.initial.tensors().items()}
        super().as_formulas(model, own | before)

    def at_start(self, folder: Path, dtype: torch.dtype) -> CausalLM:
        return assemble(
            folder, self.quant, ALONE, ShardPolicy(), precision=FP32 if dtype == torch.float32 else BF16,
            adapter=self.config, values=self.initial_values, start=self.initial,
        )[0]  # fmt: skip

    @property
    def exported(self) -> LoraConfig:
        return self.config.original_config() if self.quant is None else LoraConfig.from_peft(self.config.to_peft())

    def adapted(self, folder: Path) -> CausalLM:
        """As it is exported, since no process ever holds the model that is trained."""
        model = load_model(folder, None, torch.float32).eval()
        inject(model, self.exported)
        start = self.initial.tensors()
        tensors = {name: values + self.noise(name, values.shape) for name, values in start.items()}
        if self.quant is None:
            tensors = self.config.for_original_base(tensors, start)
        for name, values in tensors.items():
            model.get_parameter(name).data.copy_(values)
        return model


def residual_row(config: ResidualLoraConfig, scales: dict[str, float], quant: QuantConfig | None = None) -> ResidualRow:
    """scales: last part of the name of each adapted projection -> s."""
    formulas = {name: _formula(scale) for name, scale in scales.items()}
    return ResidualRow(config, formulas, dict.fromkeys(scales, LORA_OWN), stored_as=LoraConfig, quant=quant)


def _formula(scale: float) -> Formula:
    def formula(x: Tensor, W: Tensor, b: Tensor | None, own: dict[str, Tensor]) -> Tensor:
        A, B = own["lora_A.weight"], own["lora_B.weight"]
        A_0, B_0 = own["lora_A.weight, initial"], own["lora_B.weight, initial"]
        out = x @ (W + scale * (B @ A - B_0 @ A_0)).T
        return out if b is None else out + b

    return formula
