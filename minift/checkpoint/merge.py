"""Merge an adapter into its base model on disk: a PEFT folder and a Hugging Face folder become a Hugging Face folder.

One projection at a time: W is read, W + ΔW is computed in fp32, rounded once to what is written, measured and let go.
Memory is the adapter, and a few copies of the largest weight in fp32; no model is ever built.

What a merge costs in accuracy is rounding: in bf16 a weight keeps 8 significant bits, and an update smaller than that
is lost. The report has it for every weight; `peft.drift` defines it, and the three targets that a merge may have if the
adapter was trained over a quantized base. Here they are files:

    dequantized    a dense folder; every quantized projection becomes dense, adapted or not
    original       a dense folder; all weights are read from the one that the base was quantized from
    requantized    an NF4 folder; adapted projections are quantized anew, the others keep their bytes. bitsandbytes
                   spells the mean of the scales in JSON, so the size of a file depends on its values, and sizes are
                   needed before anything is written: every sum is computed twice
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from minift.checkpoint.adapters import read_config, read_tensors
from minift.checkpoint.atomic import atomic_folder
from minift.checkpoint.fingerprint import check_fingerprint
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.model.hf import TIED_HEAD, check_weights, load_config, save_model
from minift.model.linear import Linear
from minift.model.weights import TensorSpec, WeightReader
from minift.ops.nf4 import quantize_nf4
from minift.peft.adapter import Adapter, AdapterModule
from minift.peft.drift import MergeReport, MergeTarget, WeightDrift, check_target, measure_drift
from minift.peft.inject import adapter_modules, adapter_parameters, from_file, inject, stored_parameters
from minift.peft.manage import check_mergeable
from minift.quant.bitsandbytes import quantization_config, stored_tensors
from minift.quant.linear import NF4Linear, QuantConfig
from minift.quant.weights import QuantWeights, quantize_for

_EMBEDDING = "model.embed_tokens.weight"

# Another implementation may round the few elements that lie on a threshold, to the last bit, to the other side. The
# codes of another model, even one trained a little further, differ in more places than this.
_MOST_DIFFERENT_CODES = 0.01


def merge_adapter(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    target: MergeTarget | None = None,
    quant: QuantConfig | None = None,
    original_folder: str | Path | None = None,
) -> MergeReport:
    """Write the merged model to `out_folder`, which must be new or empty; it appears only when complete.

    dtype: of all dense weights written; None keeps each one's own, that of before quantization where it was quantized.
    target: None is "dequantized" over a quantized base, "original" over a dense one, which has no other.
    quant: how a dense base folder was quantized on its way into training; None: it was not.
    original_folder: the dense folder from which a base stored in NF4 was made, for the target "original" only. (A dense
        folder that was quantized on the way is its own.)

    ValueError if the adapter does not fit the base (names, shapes), or adapts an LM head whose weight is the
    embedding's, or makes biases that the format has no place for; if the base does not have the target; if
    `original_folder` is not what the base was quantized from (names, shapes, codes).
    """
    base = AdapterBase(base_folder, quant)
    target = _choose_target(target, base, original_folder)
    updates, whole = base.load_adapters(adapter_folder)
    tied = [name for name in (TIED_HEAD, _EMBEDDING) if base.config.tie_word_embeddings and name in updates]
    if tied:
        why = "and lm_head and the embedding are one; merging would change both"
        raise ValueError(f"{adapter_folder} adapts {tied[0]}, {why}")
    sources = base.weights if original_folder is None else _open_original(original_folder, base)
    drifts: list[WeightDrift] = []

    def original_weight(name: str) -> Tensor:
        weight = sources.read(name)
        if original_folder is not None:
            base.check_made_from(name, weight, original_folder)
        return weight

    takes_trained = target != "original" or not base.quantized
    unmerged = base.trained_weight if takes_trained else original_weight

    def merged(name: str, out_dtype: torch.dtype) -> Tensor:
        """The dense W + ΔW, rounded and measured."""
        trained = base.trained_weight(name)
        exact = updates[name].exact_weight(trained)
        written = (exact if takes_trained else updates[name].exact_weight(unmerged(name))).to(out_dtype)
        drifts.append(measure_drift(name, written, exact, trained))
        return written

    def requantized(projection: str, measure: Callable[[WeightDrift], None]) -> NF4Linear:
        linear, name = base.filled(projection), f"{projection}.weight"
        if name not in updates:
            return linear
        trained = linear.dense_weight()
        exact = updates[name].exact_weight(trained)
        stored = linear.storing(exact)
        measure(measure_drift(name, stored.dense_weight(), exact, trained))
        return stored

    def bias(name: str, out_dtype: torch.dtype) -> Tensor:
        """With what an adapter does to it, also where the base has none."""
        projection = name.removesuffix(".bias")
        old = nn.Parameter(unmerged(name).float()) if name in base.names else None
        adapter = updates.get(f"{projection}.weight")
        new = adapter.effective_bias(old) if isinstance(adapter, Adapter) else old
        if new is None:  # it shares a switch in config.json with one that an adapter has made
            return torch.zeros(base.weights.shape(f"{projection}.weight")[0], dtype=out_dtype)
        return new.detach().to(out_dtype)

    config = _merged_config(base.config, updates)
    again = list(base.quantized) if target == "requantized" else []
    dense = [name for name in _parameter_names(config) if name.removesuffix(".weight") not in again]
    specs: dict[str, TensorSpec] = {}
    for name in dense:
        like = name if name in base.names else f"{name.removesuffix('.bias')}.weight"
        specs[name] = (dtype or sources.dtype(like), base.weights.shape(like)[: 1 if name.endswith(".bias") else None])
    for projection in again:
        parts = stored_tensors(projection, requantized(projection, lambda drift: None))
        specs |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in dense:
            out_dtype = specs[name][0]
            if name in updates:
                yield name, merged(name, out_dtype)
            elif name in whole:
                yield name, whole[name].to(out_dtype)
            else:
                yield name, bias(name, out_dtype) if name.endswith(".bias") else unmerged(name)
        for projection in again:
            yield from stored_tensors(projection, requantized(projection, drifts.append))

    with atomic_folder(Path(out_folder)) as temporary:
        save_model(
            tensors(),
            config,
            temporary,
            specs,
            source_folder=base_folder,
            quantization_config=base.quantization_config() if again else None,
        )
    return MergeReport(target, tuple(drifts))


class AdapterBase:
    """The folder that an adapter was trained on, and which of its projections were in NF4 then."""

    def __init__(self, folder: str | Path, quant: QuantConfig | None) -> None:
        self.folder = folder
        self.config = load_config(folder)
        self.weights = QuantWeights(folder)
        with torch.device("meta"):
            self._model = CausalLM(self.config)
        check_weights(self.weights, self._model)
        self.names = _parameter_names(self.config)
        self.quantized = quantize_for(self._model, self.weights, quant)
        self._dense = [name for name, module in self._model.named_modules() if isinstance(module, Linear)]
        self.is_stored_quantized = bool(self.weights.stored.projections)

    def load_adapters(self, adapter_folder: str | Path) -> tuple[dict[str, AdapterModule], dict[str, Tensor]]:
        """Name of a base weight in its folder -> its adapter, with its parameters loaded and its base on meta; and
        weights that were trained whole."""
        inject(self._model, read_config(adapter_folder))
        check_mergeable(self._model)
        check_fingerprint(
            adapter_folder,
            self._model,
            lambda name: self.trained_weight(f"{name}.weight"),
            self.quantized.keys().__contains__,
        )
        shapes = {name: tuple(parameter.shape) for name, parameter in stored_parameters(self._model).items()}
        tensors = {
            name: from_file(self._model, name, values, lambda module: self.trained_weight(f"{module}.weight"))
            for name, values in read_tensors(adapter_folder, shapes).items()
        }
        own = adapter_parameters(self._model).keys()
        self._model.load_state_dict({name: tensors[name] for name in own}, strict=False, assign=True)
        updates = {f"{name}.weight": adapter for name, adapter in adapter_modules(self._model).items()}
        return updates, {name: values for name, values in tensors.items() if name not in own}

    def trained_weight(self, name: str) -> Tensor:
        """A weight, dense, as training saw it."""
        projection = name.removesuffix(".weight")
        return self.filled(projection).dense_weight() if projection in self.quantized else self.weights.read(name)

    def filled(self, projection: str) -> NF4Linear:
        """A quantized projection with its bytes, in memory of its own."""
        linear = copy.deepcopy(self.quantized[projection])  # on meta: copies no bytes
        self.weights.fill(projection, linear, torch.device("cpu"))
        return linear

    def check_made_from(self, name: str, original: Tensor, original_folder: str | Path) -> None:
        """ValueError if the weight called `name` is quantized here, and not from `original`."""
        projection = name.removesuffix(".weight")
        if projection not in self.quantized:
            return
        linear = self.filled(projection)
        codes, _ = quantize_nf4(original.to(linear.dtype), linear.block_size)
        changed_bits = codes ^ linear.codes.data
        num_different = (changed_bits >> 4 != 0).sum() + (changed_bits & 15 != 0).sum()
        if num_different > _MOST_DIFFERENT_CODES * linear.numel:
            raise ValueError(
                f"{original_folder} is not the model from which {self.folder} was quantized: of {name}, "
                f"{int(num_different) / linear.numel:.0%} of the 4-bit codes differ"
            )

    def quantization_config(self) -> dict:
        """For the config.json of a folder whose projections are stored as this one's were."""
        first = next(iter(self.quantized.values()))
        kind = QuantConfig(block_size=first.block_size, double_quant=first.double_quant)
        return quantization_config(kind, first.dtype, self._dense)


def _merged_config(config: ModelConfig, updates: Mapping[str, AdapterModule]) -> ModelConfig:
    """With the biases that adapters have made."""
    made = [
        name.removesuffix(".weight").rpartition(".")[2]
        for name, adapter in updates.items()
        if isinstance(adapter, Adapter) and adapter.base.bias is None and adapter.bias is not None
    ]
    try:
        return config.with_biases(made) if made else config
    except ValueError as error:
        raise ValueError(f"{error}, which merging would need; keep the adapter beside the model") from None


def _parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in CausalLM(config).named_parameters()]


def _choose_target(target: MergeTarget | None, base: AdapterBase, original_folder: str | Path | None) -> MergeTarget:
    target = target or ("dequantized" if base.quantized else "original")
    check_target(target)
    if not base.quantized and target != "original":
        raise ValueError(
            f"there is nothing to be {target} in {base.folder}, which is dense: leave the merge target out; or, if the "
            "adapter was trained over this model in NF4, say so with --nf4"
        )
    if target == "original" and base.is_stored_quantized and original_folder is None:
        raise ValueError(
            f"{base.folder} is stored in NF4, so merging into its original weights needs the folder of the model from "
            "which it was quantized: give it with --original, or choose the target dequantized"
        )
    if original_folder is not None and not (target == "original" and base.is_stored_quantized):
        why = f"the target is {target}" if base.is_stored_quantized else f"{base.folder} is dense, its own original"
        raise ValueError(f"--original is for merging into the original of a model stored in NF4, but {why}")
    return target


def _open_original(folder: str | Path, base: AdapterBase) -> WeightReader:
    """Its weights, if they are dense and have the names and shapes of the base's."""
    weights = QuantWeights(folder)
    if weights.stored.projections:
        raise ValueError(f"--original {folder} is stored in NF4 itself; give the dense model from which it was made")
    found = set(weights.names())
    for name in base.names:
        shape = weights.shape(name) if name in found else "missing"
        if shape != base.weights.shape(name):
            raise ValueError(
                f"{folder} is not the model from which {base.folder} was quantized: {name} is {shape} in the first and "
                f"{base.weights.shape(name)} in the second"
            )
    return weights
