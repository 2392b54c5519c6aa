"""Every projection before and after fine-tuning, one at a time, from folders: a model and an adapter of it, or another
model; and an adapter whose intruder dimensions are scaled down.

    analyses = [analyze_weight(*weight) for weight in adapted_weights("model", "adapter", None)]
    scale_intruders("model", "adapter", "calmer", factor=0.5)
    minift eval loss --model model --adapter calmer --data heldout.jsonl        # what it does to task and forgetting
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minift.analysis.spectrum import find_intruders
from minift.checkpoint.adapters import base_model_of, save_adapter
from minift.checkpoint.atomic import refuse_occupied
from minift.checkpoint.combine import plain_lora, read_updates
from minift.checkpoint.fingerprint import read_fingerprint
from minift.checkpoint.merge import AdapterBase
from minift.peft.combine import nearest_of_rank
from minift.quant.linear import QuantConfig
from minift.quant.weights import QuantWeights

Weight = tuple[str, Tensor, Tensor]
"""Name, W and W + ΔW in fp64."""


def adapted_weights(
    model_folder: str | Path, adapter_folder: str | Path, quant: QuantConfig | None
) -> Iterator[Weight]:
    """Of a base as the adapter was trained on it (`quant`: in 4 bits). ValueError if the adapter does not fit, or is no
    dense weight."""
    base = AdapterBase(model_folder, quant)
    updates, whole = base.load_adapters(adapter_folder)
    for name, adapter in updates.items():
        weight = base.trained_weight(name).double()
        yield name.removesuffix(".weight"), weight, adapter.exact_weight(weight)
    for name, after in whole.items():
        if after.ndim == 2:
            yield name.removesuffix(".weight"), base.trained_weight(name).double(), after.double()


def changed_weights(model_folder: str | Path, new_folder: str | Path) -> Iterator[Weight]:
    """Of a model that was trained whole: its projections, the embedding and the head aside."""
    before, after = QuantWeights(model_folder), QuantWeights(new_folder)
    missing = sorted(set(before.names()) ^ set(after.names()))
    if missing:
        raise ValueError(f"{model_folder} and {new_folder} are different models: only one of them has {missing[0]}")
    for name in before.names():
        if len(before.shape(name)) == 2 and name.endswith("_proj.weight"):
            yield name.removesuffix(".weight"), before.read(name).double(), after.read(name).double()


def scale_intruders(
    model_folder: str | Path,
    adapter_folder: str | Path,
    out_folder: str | Path,
    *,
    factor: float,
    quant: QuantConfig | None = None,
    top: int = 10,
    threshold: float = 0.5,
) -> dict[str, int]:
    """Write a LoRA with which every intruder dimension of W' has `factor` times its singular value, and return how many
    there were in each module.

    n intruders of a LoRA of rank r make one of rank r + n at most, in that module alone; the rest is as it was. To the
    rounding of the factors to fp32. ValueError for a method other than LoRA; before
    anything is read, for a factor or a folder that cannot be.
    """
    if not 0.0 <= factor < 1.0:
        raise ValueError(f"the factor for intruders is {factor}; valid: from 0, which removes them, to below 1")
    refuse_occupied(Path(out_folder))
    updates = {factors.module: (factors, update) for factors, update in read_updates(adapter_folder).items()}
    counts, tensors, ranks = {}, {}, {}
    for module, before, after in adapted_weights(model_folder, adapter_folder, quant):
        factors, update = updates[module]
        A, B = update.A, update.scale * update.B
        counts[module] = 0
        if "embedding" not in factors.A:
            intruders, columns, rows = find_intruders(before, after, top, threshold)
            counts[module] = len(intruders)
            if intruders:
                A, B = torch.cat([A.double(), rows]), torch.cat([B.double(), (factor - 1.0) * columns], dim=1)
                A, B = nearest_of_rank(A, B, min(len(A), *before.shape))
        tensors |= {factors.A: A, factors.B: B}
        ranks[module] = len(A)
    base_model, fingerprint = base_model_of(adapter_folder), read_fingerprint(adapter_folder)
    save_adapter(out_folder, plain_lora(ranks), tensors, base_model=base_model, fingerprint=fingerprint)
    return counts
