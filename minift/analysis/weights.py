"""Every projection before and after fine-tuning, one at a time, from folders: a model and an adapter of it, or another
model; and an adapter whose intruder dimensions are scaled down.

    scaling = IntruderScaling("adapter", "calmer", factor=0.5)
    found = {name: find_intruders(W, new_W) for name, W, new_W in adapted_weights("model", "adapter", None)}
    scaling.write(found)
    minift eval loss --model model --adapter calmer --data heldout.jsonl        # what it does to task and forgetting
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minift.analysis.spectrum import Intruders
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
    """Of a model that was trained whole: its projections, the embedding and the head aside. ValueError unless the two
    have the same weights, in the same shapes."""
    before, after = QuantWeights(model_folder), QuantWeights(new_folder)
    missing = sorted(set(before.names()) ^ set(after.names()))
    if missing:
        raise ValueError(f"{model_folder} and {new_folder} are different models: only one of them has {missing[0]}")
    for name in before.names():
        shape, new_shape = tuple(before.shape(name)), tuple(after.shape(name))
        if shape != new_shape:
            raise ValueError(f"{name} is {shape} in {model_folder} and {new_shape} in {new_folder}; valid: one shape")
        if len(shape) == 2 and name.endswith("_proj.weight"):
            yield name.removesuffix(".weight"), before.read(name).double(), after.read(name).double()


class IntruderScaling:
    """A LoRA that will be written again, with every intruder dimension of W' at `factor` times its singular value.

    Made before the weights are taken apart, so that what cannot be is refused first: ValueError for a factor or a
    folder that is not valid, and for a method other than LoRA.
    """

    def __init__(self, adapter_folder: str | Path, out_folder: str | Path, factor: float) -> None:
        if not 0.0 <= factor < 1.0:
            raise ValueError(f"the factor for intruders is {factor}; valid: from 0, which removes them, to below 1")
        refuse_occupied(Path(out_folder))
        self._adapter_folder, self._out_folder, self._factor = adapter_folder, out_folder, factor
        self._updates = read_updates(adapter_folder)

    def write(self, intruders: Mapping[str, Intruders]) -> dict[str, int]:
        """`intruders`: of every adapted weight, by its name. Returns how many were scaled in each module.

        n intruders of a LoRA of rank r make one of rank r + n at most, in that module alone; the rest is as it was. To
        the rounding of the factors to fp32. Those of an embedding are left.
        """
        counts, tensors, ranks = {}, {}, {}
        for factors, update in self._updates.items():
            A, B, found = update.A, update.scale * update.B, intruders[factors.module]
            counts[factors.module] = 0 if "embedding" in factors.A else len(found.found)
            if counts[factors.module]:
                A = torch.cat([A.double(), found.rows])
                B = torch.cat([B.double(), (self._factor - 1.0) * found.columns], dim=1)
                A, B = nearest_of_rank(A, B, min(len(A), len(B), A.shape[1]))
            tensors |= {factors.A: A, factors.B: B}
            ranks[factors.module] = len(A)
        base_model, fingerprint = base_model_of(self._adapter_folder), read_fingerprint(self._adapter_folder)
        save_adapter(self._out_folder, plain_lora(ranks), tensors, base_model=base_model, fingerprint=fingerprint)
        return counts
