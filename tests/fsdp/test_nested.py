"""Oracle: what was put in."""

from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import torch

from minift.fsdp.nested import map_tensors


class Pair(NamedTuple):
    first: object
    second: object


def test_each_tensor_that_requires_grad_is_replaced_once_everywhere():
    wanted, other = torch.ones(2, requires_grad=True), torch.ones(2)
    given = ((wanted, [other, {"again": wanted}]), {"pair": Pair(wanted, 3)})
    seen: list[list[torch.Tensor]] = []
    new = torch.zeros(2)

    def function(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        seen.append(tensors)
        return tuple(new for _ in tensors)

    (first, (kept, inner)), named = map_tensors(given, function)
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0] is wanted
    assert first is new and inner["again"] is new and kept is other
    assert isinstance(named["pair"], Pair) and named["pair"].first is new and named["pair"].second == 3


def test_without_such_a_tensor_nothing_is_called():
    given = (torch.ones(2), {"n": 1})
    assert map_tensors(given, lambda tensors: 1 / 0) is given


def test_nothing_stays_behind():
    """A cycle would keep activations of every block until the garbage collector comes by."""
    tensor = torch.ones(2, requires_grad=True)
    alive = weakref.ref(tensor)
    gc.collect()
    gc.disable()
    try:
        map_tensors(([tensor], {}), lambda tensors: tuple(tensors))
        del tensor
        assert alive() is None
    finally:
        gc.enable()
