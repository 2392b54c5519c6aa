"""Tensors inside of the nested arguments and results of a module's forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside tensors, tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value):  # what an objective returns
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])


def map_tensors(container: Any, function: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> Any:
    """`container` (tuple, list or dict) with its tensors that require grad replaced by `function` of all of them."""
    inputs: dict[int, Tensor] = {}  # each once
    _rebuild(container, lambda tensor: inputs.setdefault(id(tensor), tensor))
    if not inputs:
        return container
    replaced = dict(zip(inputs, function(list(inputs.values())), strict=True))
    return _rebuild(container, lambda tensor: replaced[id(tensor)])


def _rebuild(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `replace` of its tensors that require grad. A function of the module: one that called itself by a
    name of an enclosing call would be a cycle, and keep these tensors until the garbage collector comes by."""
    if isinstance(value, Tensor):
        return replace(value) if value.requires_grad else value
    if isinstance(value, tuple) and type(value) is not tuple:  # a named one
        return type(value)(*(_rebuild(item, replace) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_rebuild(item, replace) for item in value)
    if isinstance(value, dict):
        return {key: _rebuild(item, replace) for key, item in value.items()}
    return value
