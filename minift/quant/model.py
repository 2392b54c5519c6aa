"""A model that one process holds whole, its projections in NF4 if that is asked for, or if the folder has them so."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minift.model.decoder import CausalLM
from minift.model.hf import check_weights, fill_parameters, load_config
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights, quantize_for


def load_model(
    folder: str | Path, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CausalLM:
    """Dense weights are cast to `dtype`, one tensor at a time. ValueError for a folder that does not fit."""
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    weights = QuantWeights(folder)
    check_weights(weights, model)
    quantized = quantize_for(model, weights, quant)

    def read(name: str) -> Tensor:
        projection, _, part = name.rpartition(".")
        if projection not in quantized or part == "bias":
            return weights.read(name).to(device=device, dtype=dtype)
        linear = quantized[projection]
        return weights.read_bytes(linear, name, 0, linear.get_parameter(part).numel()).to(device)

    fill_parameters(model, read)
    return model
