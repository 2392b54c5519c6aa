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
    inputs: list[Tensor] = []
    replaced: dict[int, Tensor] = {}

    def rebuild(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.requires_grad and not replaced:
                inputs.append(value)
            return replaced.get(id(value), value)
        if isinstance(value, tuple) and type(value) is not tuple:  # a named one
            return type(value)(*(rebuild(item) for item in value))
        if isinstance(value, tuple | list):
            return type(value)(rebuild(item) for item in value)
        if isinstance(value, dict):
            return {key: rebuild(item) for key, item in value.items()}
        return value

    rebuild(container)
    if not inputs:
        return container
    replaced = {id(old): new for old, new in zip(inputs, function(inputs), strict=True)}
    return rebuild(container)
