"""When units gather, free and reduce: module and autograd hooks. No option lives here; see `policy`.

    pre-forward     gather                                   tag the unit's inputs with `_BackwardDone`
    post-forward    free (unless the policy keeps it)        hook the unit's outputs
    pre-backward    gather (unless FULL), when the first gradient of an output arrives
    post-backward   reduce gradients, free, when the gradients of all its inputs are out (`_BackwardDone.backward`)
    end of backward the same for what is left: the root, and units whose inputs need no gradient

[Note: what autograd may save] A ring slot is overwritten between a unit's forward and its backward, so nothing that
autograd saves may point into it. minift's own operations keep the `Parameter` object, which by then has been gathered
again, and never a view of its data. An operation that does save such a view (`F.linear` saves `weight.t()`) would
silently compute wrong gradients; `guard_saved_tensors` watches the first forward and refuses it by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minift.fsdp.unit import Ring, Unit, UnitState


class Hooks:
    """Drives the units of one model through forward and backward. The first unit is the root, which holds what no other
    unit does and stays FULL from the start of forward to the end of backward."""

    def __init__(self, root: Unit, blocks: list[Unit], rings: list[Ring], reshard_after_forward: bool) -> None:
        self.root = root
        self.units = [root, *blocks]
        self.reshard_after_forward = reshard_after_forward
        self.in_backward = False
        self._rings = rings
        self._guard = contextlib.ExitStack()  # open during the first forward that is trained on
        self._guarded = False
        for unit in self.units:
            unit.module.register_forward_pre_hook(self._pre_forward_of(unit), prepend=True, with_kwargs=True)
            unit.module.register_forward_hook(self._post_forward_of(unit))

    # Forward #

    def _pre_forward_of(self, unit: Unit) -> Callable[..., Any]:
        def pre_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if unit is self.root:
                self.reset()
            if self.in_backward:  # a recomputation: the unit was gathered for its backward
                assert unit.state is UnitState.FULL, f"recomputation of {unit.name!r} outside its own backward"
                return None
            if unit is self.root and not self._guarded and torch.is_grad_enabled():
                self._guard.enter_context(guard_saved_tensors(self._rings))
            unit.start_gather()
            unit.wait_gather()
            if unit is self.root or not torch.is_grad_enabled():
                return None

            def tag(inputs: list[Tensor]) -> tuple[Tensor, ...]:
                return _BackwardDone.apply(lambda: self._post_backward(unit), *inputs)

            return map_tensors((args, kwargs), tag)

        return pre_forward

    def _post_forward_of(self, unit: Unit) -> Callable[..., Any]:
        def post_forward(module: nn.Module, args: tuple, output: Any) -> None:
            if self.in_backward:
                return
            if unit is self.root and not self._guarded:
                self._guarded = torch.is_grad_enabled()
                self._guard.close()
            needs_backward = False
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    needs_backward = True
                    tensor.register_hook(lambda grad: self._pre_backward(unit))
            keep = needs_backward and (unit is self.root or not self.reshard_after_forward)
            if not keep:
                unit.free()

        return post_forward

    # Backward #

    def _pre_backward(self, unit: Unit) -> None:
        if not self.in_backward:
            self.in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        if unit.state is UnitState.SHARDED:
            unit.start_gather()
            unit.wait_gather()

    def _post_backward(self, unit: Unit) -> None:
        unit.reduce()
        unit.free()

    def _end_of_backward(self) -> None:
        for unit in reversed(self.units):
            if unit.state is UnitState.FULL:
                self._post_backward(unit)
        self.in_backward = False

    def reset(self) -> None:
        """Free whatever a forward without a backward, or a failed step, left gathered."""
        self.in_backward = False
        self._guard.close()
        for unit in self.units:
            unit.abort()


class _BackwardDone(torch.autograd.Function):
    """Identity on a unit's inputs; its backward runs when all of their gradients are complete, which is when the
    gradients of the unit's parameters are complete too (autograd runs accumulation nodes first)."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.done()
        return (None, *grads)


# Tensors in nested arguments #


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
    inputs = [t for t in tensors_in(container) if t.requires_grad]
    if not inputs:
        return container
    replaced = {id(old): new for old, new in zip(inputs, function(inputs), strict=True)}

    def rebuild(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replaced.get(id(value), value)
        if isinstance(value, tuple | list):
            return type(value)(rebuild(item) for item in value)
        if isinstance(value, dict):
            return {key: rebuild(item) for key, item in value.items()}
        return value

    return rebuild(container)


@contextlib.contextmanager
def guard_saved_tensors(rings: list[Ring]) -> Iterator[None]:
    """Raise `RuntimeError` when autograd saves a tensor inside a ring slot. See [Note: what autograd may save]."""

    def pack(tensor: Tensor) -> Tensor:
        # A Parameter itself is safe: autograd keeps the object, and its data is current when backward reads it.
        if not isinstance(tensor, nn.Parameter) and any(ring.owns(tensor) for ring in rings):
            raise RuntimeError(
                f"an operation saved a view of a gathered parameter for backward (shape {tuple(tensor.shape)}, "
                f"{tensor.dtype}); its memory will hold another layer by then. Use minift's Linear, Embedding and "
                "RMSNorm, or write an autograd.Function that keeps the Parameter and reads it again in backward"
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
