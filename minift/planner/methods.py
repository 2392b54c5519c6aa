"""What a method of `minift/peft` keeps for backward beside the products of its updates: found by running it.

The formulas of `activations.py` know weights, biases and low-rank updates. Anything else that a method trains is run
once on the meta device, where tensors have sizes and no memory, and what autograd saves is looked at. So a new method
need not say what it costs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift.model.linear import LinearBase
from minift.peft.adapter import AdapterModule

_TOKENS, _MANY_TOKENS = 64, 1 << 20
"""More than the products with NF4 weights treat apart; so many that a weight is less than one of their activations."""


@dataclass(frozen=True)
class MethodShape:
    """trains: whether the method has parameters that are in no update. keeps_input, keeps_output: whether its forward
    keeps these tensors. other_features: elements of tensors beside them, a token. is_opaque: whether only its forward
    knows what it does (`LinearBase.parts`); has_after: whether it is a function of the sum of its parts; slices_weight:
    whether its forward reads the stored weight, in fp32, slice by slice (`LinearBase.weight_slices`). forward_features:
    if it is opaque, elements a token that its forward has at once, its result and what it keeps among them."""

    trains: bool = False
    keeps_input: bool = False
    keeps_output: bool = False
    other_features: float = 0.0
    is_opaque: bool = False
    has_after: bool = False
    slices_weight: bool = False
    forward_features: float = 0.0


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
    other_features, forward_features, is_opaque = (more - some) / _TOKENS - rank, 0.0, module.parts() is None
    if is_opaque:
        most, more = (_most_at_once(module, count) for count in (_MANY_TOKENS, 2 * _MANY_TOKENS))
        forward_features = (more - most) / _MANY_TOKENS
    return MethodShape(
        True, keeps_input, keeps_output, other_features, is_opaque, module.has_after, bool(reads), forward_features
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


def _most_at_once(module: LinearBase, num_tokens: int) -> float:
    """Elements that a forward has at once, beside its input."""
    x = torch.empty(num_tokens, module.in_features, dtype=torch.float32, device="meta", requires_grad=True)
    with torch.random.fork_rng(devices=[]), _Alive(x, *module.parameters()) as alive:
        module(x)
    return alive.most_bytes / x.itemsize


class _Alive(TorchDispatchMode):
    """Counts bytes that operations make, for as long as a tensor lies in them; not those of `known` tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.most_bytes = 0
        self._bytes = 0
        self._known = {_storage(tensor) for tensor in known}
        self._num_tensors: Counter[int] = Counter()  # by where they lie

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor)) not in self._known:
                num_bytes = tensor.untyped_storage().nbytes()
                self._bytes += num_bytes if self._num_tensors[storage] == 0 else 0
                self.most_bytes = max(self.most_bytes, self._bytes)
                self._num_tensors[storage] += 1
                weakref.finalize(tensor, self._forget, storage, num_bytes)
        return out

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._num_tensors[storage] -= 1
        self._bytes -= num_bytes if self._num_tensors[storage] == 0 else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
