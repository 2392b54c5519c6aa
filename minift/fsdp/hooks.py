"""When units gather, free and reduce: module and autograd hooks. No option lives here; see `policy`.

    pre-forward     gather, unless FULL; start gathering the units that follow; tag the inputs with `_BackwardDone`
    post-forward    free, unless it is kept; hook the unit's outputs
    pre-backward    gather, unless FULL; start gathering the units that follow; lay gradient slots. When the first
                    gradient of an output arrives
    post-backward   start reducing the gradients, free. When the gradients of all its inputs are out
                    (`_BackwardDone.backward`)
    end of backward the same for what is left: the root, and units whose inputs need no gradient; finish all reductions

At most as many reductions are under way as there are reduce buffers, or REDUCTIONS_IN_FLIGHT where gradients need none;
the oldest is finished when its buffer is needed.
The unit that ended the forward begins the backward: it is not freed in between.

[Note: what autograd may save] A gather buffer is overwritten between a unit's forward and its backward, so nothing that
autograd saves may point into it. minift's own operations keep the `Parameter` object, which by then has been gathered
again, and never a view of its data. An operation that does save such a view (`F.linear` saves `weight.t()`) would
silently compute wrong gradients; `guard_saved_tensors` watches the first forward of every unit and refuses it by name.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minift.fsdp.bucket import Bucket
from minift.fsdp.nested import map_tensors, tensors_in
from minift.fsdp.schedule import Order
from minift.fsdp.unit import REDUCTIONS_IN_FLIGHT, GradState, Keep, Ring, Unit, UnitState
from minift.trace import Mark, Recorder


class Hooks:
    """Drives the units of one model through forward and backward. The first unit is the root, which holds what no other
    unit does and stays FULL from the start of forward to the end of backward."""

    def __init__(
        self, units: list[Unit], prefetch_units: int, recorder: Recorder, meet_around_update: Callable[[], None]
    ) -> None:
        self.units = units
        self.root = units[0]
        self.forward_order, self.backward_order = Order(), Order()
        self.in_backward = False
        self.is_last_microbatch = True
        """Whether the next backward completes the gradients of the step."""
        self.on_reduced: Callable[[list[Bucket]], None] | None = None
        """Called as soon as the gradients of a unit are complete, in the last microbatch."""
        self._prefetch_units = prefetch_units
        self._recorder = recorder
        self._meet_around_update = meet_around_update
        self._reducing: deque[Unit] = deque()
        self._replica_sums: deque[tuple[Unit, list[dist.Work], Mark | None]] = deque()
        self._held: Unit | None = None  # FULL after its forward, because its backward is expected next
        self._forward_marks: dict[str, Mark | None] = {}
        self._backward_marks: dict[str, Mark | None] = {}
        self._guard = contextlib.ExitStack()  # open during forward
        self._unguarded = {
            unit.name for unit in units if unit.keep is Keep.UNTIL_FORWARD_ENDS
        }  # not yet seen to be safe
        for unit in units:
            unit.module.register_forward_pre_hook(self._pre_forward_of(unit), prepend=True, with_kwargs=True)
            unit.module.register_forward_hook(self._post_forward_of(unit))

    # Forward #

    def _pre_forward_of(self, unit: Unit) -> Callable[..., Any]:
        def pre_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if unit is self.root:
                self._begin_forward()
            if self.in_backward:  # a recomputation: the unit was gathered for its backward
                assert unit.state is UnitState.FULL, f"recomputation of {unit.name!r} outside its own backward"
                return None
            if unit is self.root:
                self.forward_order.begin()
                self._begin_guard()
            self._gather(unit, self.forward_order)
            self._forward_marks[unit.name] = self._recorder.mark()
            if not torch.is_grad_enabled():
                return None
            if unit is self.root:
                unit.open_gradients()  # a loss may compute the gradient of the head in its forward
                return None

            def tag(inputs: list[Tensor]) -> tuple[Tensor, ...]:
                return _BackwardDone.apply(lambda: self._post_backward(unit), *inputs)

            return map_tensors((args, kwargs), tag)

        return pre_forward

    def _post_forward_of(self, unit: Unit) -> Callable[..., Any]:
        def post_forward(module: nn.Module, args: tuple, output: Any) -> None:
            if self.in_backward:
                return
            self._recorder.span("compute", "forward", unit.name, self._forward_marks[unit.name])
            if torch.is_grad_enabled():
                self._unguarded.discard(unit.name)
            if unit is self.root:
                self.forward_order.end()
                self._guard.close()
                self._meet_before_update()
            needs_backward = False
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    needs_backward = True
                    tensor.register_hook(lambda grad: self._pre_backward(unit))
            unit.pending_backwards += needs_backward
            if unit.keep is Keep.UNTIL_FORWARD_ENDS and needs_backward and self.forward_order.is_last(unit):
                self._held = unit
            elif unit.keep is Keep.UNTIL_FORWARD_ENDS or (unit.keep is Keep.UNTIL_BACKWARD_ENDS and not needs_backward):
                unit.free()

        return post_forward

    # Backward #

    def _pre_backward(self, unit: Unit) -> None:
        if not self.in_backward:
            self.in_backward = True
            self.backward_order.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        is_second = unit.takes_turns and not all(bucket.grad_is_empty for bucket in unit.trainable)
        if is_second or (unit.is_complete and (unit.sums_once or self.on_reduced is not None)):
            raise RuntimeError(
                f"a second backward reached unit {unit.name!r} after its gradients of this step had been summed up (or "
                "its weights updated); say engine.expect_microbatch(is_last=False) before each microbatch but the last "
                "and engine.clear_gradients() after the step; with step_in_backward a unit may run only once in a step"
            )
        if unit.grad_state is GradState.REDUCING:  # its previous microbatch
            self._finish_reductions(until=unit)
        elif unit.lacks_reduce_buffer:
            if not self._reducing:
                self._refuse_open_backwards(unit, "gradients")
            self._finish_reductions(until=self._reducing[0])
        if unit.takes_turns and self.on_reduced is None:
            raise RuntimeError(
                "fsdp.step_in_backward gives gradients memory until the update in backward only; say what updates with "
                "engine.update_in_backward() before the backward"
            )
        self._gather(unit, self.backward_order)
        unit.open_gradients()
        self._backward_marks[unit.name] = self._recorder.mark()

    def _post_backward(self, unit: Unit) -> None:
        if unit.name in self._backward_marks:  # else only its forward ran, or its output was not used
            self._recorder.span("compute", "backward", unit.name, self._backward_marks.pop(unit.name))
        unit.pending_backwards = max(0, unit.pending_backwards - 1)
        # Gradients that are kept whole can be reduced once; after two forwards, a second backward of the unit comes.
        waits = unit.keeps_full_grads and unit.pending_backwards > 0
        if unit.grad_state is GradState.OPEN and not waits:
            unit.start_reduce(self.is_last_microbatch)
            self._reducing.append(unit)
            if unit.reduces_alone:
                self._finish_reductions(until=unit)  # which has nobody to wait for; sums over replicas can begin
            elif unit.keeps_full_grads and len(self._reducing) > REDUCTIONS_IN_FLIGHT:
                self._finish_reductions(until=self._reducing[0])
        if unit.keep is not Keep.UNTIL_UPDATE:
            unit.free()

    def _end_of_backward(self) -> None:
        for unit in reversed(self.units):
            unit.pending_backwards = 0
            if unit.grad_state is GradState.OPEN or (
                unit.state is UnitState.FULL and unit.keep is not Keep.UNTIL_UPDATE
            ):
                self._post_backward(unit)
            elif unit.state is UnitState.GATHERING and unit.keep is not Keep.UNTIL_UPDATE:
                unit.abort_gather()  # gathered ahead, and then it did not run
        if self._reducing:
            self._finish_reductions(until=self._reducing[-1])
        if self.is_last_microbatch:
            for unit in self.units:
                self._complete(unit)
        while self._replica_sums:
            self._finish_replica_sum()
        self.backward_order.end()
        self._backward_marks.clear()
        self.in_backward = False

    def _complete(self, unit: Unit) -> None:
        """Sum up what is summed up once a step, of a unit that the last microbatch did not come through, or twice."""
        if unit.is_complete or not unit.trainable:
            return
        if all(bucket.grad_is_empty for bucket in unit.trainable):
            unit.zero_gradients()
        elif unit.keeps_full_grads:
            unit.open_gradients()
            unit.start_reduce(is_last_microbatch=True)
            unit.finish_reduce()
        self._start_replica_sum(unit)

    def _finish_reductions(self, until: Unit) -> None:
        """Finish the reductions under way, oldest first, up to that of `until`."""
        unit = None
        while unit is not until:
            unit = self._reducing.popleft()
            with self._recorder.during("compute", "wait", unit.name):
                unit.finish_reduce()
            if self.is_last_microbatch and unit.pending_backwards == 0:
                self._start_replica_sum(unit)

    def _start_replica_sum(self, unit: Unit) -> None:
        started = self._recorder.mark()
        self._replica_sums.append((unit, unit.start_replica_sum(), started))
        if self.on_reduced is not None:  # the memory of this gradient is needed for the next but one
            self._finish_replica_sum()

    def _finish_replica_sum(self) -> None:
        unit, works, started = self._replica_sums.popleft()
        if works:
            with self._recorder.during("compute", "wait", unit.name):
                for work in works:
                    work.wait()
            self._recorder.span("reduce-scatter", "all-reduce", unit.name, started)
        if self.on_reduced is not None:
            self.on_reduced(unit.trainable)

    # Both #

    def _gather(self, unit: Unit, order: Order) -> None:
        """Make `unit` FULL, and start gathering what will run after it while there is memory for that."""
        ahead = order.visit(unit, self._prefetch_units)
        if unit is self._held:
            self._held = None
        if unit.state is UnitState.SHARDED:
            if not unit.gather_ring.has_free:
                self._drop_prefetched(unit.gather_ring)
            if not unit.gather_ring.has_free:
                self._refuse_open_backwards(unit, "parameters")
            unit.start_gather()
        if unit.state is UnitState.GATHERING:
            unit.wait_gather()
        for later in ahead:
            if later.state is UnitState.SHARDED and later.gather_ring.has_free:
                later.start_gather()

    def _drop_prefetched(self, ring: Ring) -> None:
        """The model went another way than last time: take back the buffers of units that were expected to run."""
        for unit in self.units:
            if unit.gather_ring is ring and (unit.state is UnitState.GATHERING or unit is self._held):
                unit.abort_gather()
        self._held = None

    def _refuse_open_backwards(self, unit: Unit, what: str) -> NoReturn:
        holders = [other.name for other in self.units if other is not self.root and other.grad_state is GradState.OPEN]
        raise RuntimeError(
            f"unit {unit.name!r} has nowhere to put its {what}: the backward of {holders} has begun and not ended, "
            "which nobody notices when the inputs of a unit need no gradient. Only one such unit is sure to work (the "
            "first of a model); for more, let their inputs require one"
        )

    def free_updated(self) -> None:
        """The masters have changed: gathered copies that outlive a step are worthless now."""
        for unit in self.units:
            if unit.keep is Keep.UNTIL_UPDATE and unit.state is not UnitState.SHARDED:
                unit.abort_gather()  # also what was gathered ahead and then not used

    def _begin_forward(self) -> None:
        """Free whatever a forward without a backward left gathered."""
        if self.in_backward:
            raise RuntimeError("the last backward failed and left gradients behind; call engine.reset() first")
        for unit in self.units:
            if unit.keep is not Keep.UNTIL_UPDATE and unit.state is not UnitState.SHARDED:
                unit.abort_gather()
        self._held = None
        self._meet_before_update()

    def _meet_before_update(self) -> None:
        """A forward that comes when gradients are complete: no rank may be updating when it begins, or begin to update
        before all have ended it. (Any other is followed by reductions, for which ranks wait.)"""
        if any(unit.is_complete for unit in self.units):
            self._meet_around_update()

    def reset(self) -> None:
        """Leave a step that failed: nothing gathered, nothing being reduced."""
        self.in_backward = False
        self.is_last_microbatch = True
        self._guard.close()
        self._backward_marks.clear()
        self._reducing.clear()
        for _, works, _ in self._replica_sums:
            for work in works:
                work.wait()  # it must not write gradients of a later step
        self._replica_sums.clear()
        self._held = None
        for unit in self.units:
            unit.abort()

    def _begin_guard(self) -> None:
        if self._unguarded and torch.is_grad_enabled():
            passing = [unit.gather_ring for unit in self.units if unit.keep is Keep.UNTIL_FORWARD_ENDS]
            rings = list({id(ring): ring for ring in passing}.values())
            self._guard.enter_context(guard_saved_tensors(rings))


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


@contextlib.contextmanager
def guard_saved_tensors(rings: list[Ring]) -> Iterator[None]:
    """Raise `RuntimeError` when autograd saves a tensor inside a gather buffer. See [Note: what autograd may save]."""

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
