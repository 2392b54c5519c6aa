"""Quantise a model on disk: a Hugging Face folder becomes one in NF4, as transformers + bitsandbytes would write it.

One projection is in memory at a time. What is not quantised (embeddings, norms, lm_head) keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minift.checkpoint.atomic import atomic_folder
from minift.checkpoint.initial import InitialAdapter, ResidualWeights
from minift.model.decoder import CausalLM
from minift.model.hf import check_weights, load_config, save_model
from minift.model.linear import Linear
from minift.quant.bitsandbytes import quantization_config, stored_specs, stored_tensors
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights, quantize_for


def quantize_folder(
    base_folder: str | Path, out_folder: str | Path, quant: QuantConfig, initial: InitialAdapter | None = None
) -> None:
    """Write `out_folder`, which must be new or empty; it appears only when complete. initial: what an adapter has taken
    out of the weights where it started. ValueError for a folder that does not fit, or is quantised already."""
    config = load_config(base_folder)
    weights = QuantWeights(base_folder) if initial is None else ResidualWeights(base_folder, initial)
    if weights.stored.projections:
        raise ValueError(f"{base_folder} is quantised already")
    with torch.device("meta"):
        model = CausalLM(config)
    check_weights(weights, model)
    names = [name for name, _ in model.named_parameters()]
    quantized = quantize_for(model, weights, quant)
    dense = [name for name in names if name.removesuffix(".weight") not in quantized]
    specs = {name: (weights.dtype(name), weights.shape(name)) for name in dense}
    for projection, linear in quantized.items():
        offset = 0.0
        if quant.double_quant:
            offset = float(weights.read_bytes(linear, f"{projection}.nested", 0, 4).view(torch.float32))
        specs |= stored_specs(projection, linear, offset)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in dense:
            yield name, weights.read(name)
        for projection, linear in quantized.items():
            weights.fill(projection, linear, torch.device("cpu"))
            yield from stored_tensors(projection, linear)
            linear.to("meta")

    compute_dtype = weights.dtype(f"{next(iter(quantized))}.weight")
    not_quantized = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    with atomic_folder(Path(out_folder)) as temporary:
        save_model(
            tensors(),
            config,
            temporary,
            specs,
            source_folder=base_folder,
            quantization_config=quantization_config(quant, compute_dtype, not_quantized),
        )
