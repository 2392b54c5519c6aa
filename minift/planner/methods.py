"""What a method of `minift/peft` keeps for backward beside the products of its updates: found by running it.

The formulas of `activations.py` know weights, biases and low-rank updates. Anything else that a method trains is run
once on the meta device, where tensors have sizes and no memory, and what autograd saves is looked at. So a new method
need not say what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minift.model.linear import LinearBase
from minift.peft.adapter import AdapterModule

_TOKENS = 64
"""More than the products with NF4 weights treat apart."""


@dataclass(frozen=True)
class MethodShape:
    """trains: whether the method has parameters that are in no update. keeps_input, keeps_output: whether its forward
    keeps these tensors. other_features: elements of tensors beside them, a token. is_opaque: whether only its forward
    knows what it does (`LinearBase.parts`); has_after: whether it is a function of the sum of its parts; slices_weight:
    whether its forward reads the stored weight, in fp32, slice by slice (`LinearBase.weight_slices`)."""

    trains: bool = False
    keeps_input: bool = False
    keeps_output: bool = False
    other_features: float = 0.0
    is_opaque: bool = False
    has_after: bool = False
    slices_weight: bool = False


def method_of(module: LinearBase, known: dict[str, MethodShape]) -> MethodShape:
    """Of a projection on the meta device, in fp32, its adapter included. known: what was found of others like it."""
    if not isinstance(module, AdapterModule):
        return MethodShape()
    _, updates = module.parts() or (module, ())
    in_updates = {id(factor) for update in updates for factor in (update.A, update.B)}
    if all(id(parameter) in in_updates for _, parameter in module.own_parameters()):
        return MethodShape()
    key = repr(module)
    if key not in known:
        known[key] = _run(module, sum(len(update.A) for update in updates))
    return known[key]


def _run(module: AdapterModule, rank: int) -> MethodShape:
    """rank: of the updates, whose products are counted elsewhere."""
    with _watched_slices(module.base) as reads:
        keeps_input, keeps_output, some = _saved(module, _TOKENS)
    _, _, more = _saved(module, 2 * _TOKENS)  # the difference is what goes with tokens
    return MethodShape(
        trains=True,
        keeps_input=keeps_input,
        keeps_output=keeps_output,
        other_features=(more - some) / _TOKENS - rank,
        is_opaque=module.parts() is None,
        has_after=module.has_after,
        slices_weight=bool(reads),
    )


@contextmanager
def _watched_slices(base: LinearBase) -> Iterator[list[torch.dtype]]:
    """In which dtypes somebody has asked for `weight_slices` since."""
    reads, make = [], base.weight_slices

    def watched(dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        reads.append(dtype)
        return make(dtype)

    base.weight_slices = watched
    try:
        yield reads
    finally:
        del base.weight_slices


def _saved(module: LinearBase, num_tokens: int) -> tuple[bool, bool, float]:
    """(its input, its result, elements of other tensors) that a forward saves; a byte is a quarter of an element."""
    x = torch.empty(num_tokens, module.in_features, dtype=torch.float32, device="meta", requires_grad=True)
    weights = {_storage(parameter) for parameter in module.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and _storage(tensor) not in weights:
            saved[_storage(tensor)] = tensor
        return tensor

    with torch.random.fork_rng(devices=[]), saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    keeps_input = saved.pop(_storage(x), None) is not None
    keeps_output = saved.pop(_storage(y), None) is not None
    return keeps_input, keeps_output, sum(tensor.nbytes for tensor in saved.values()) / x.itemsize


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
