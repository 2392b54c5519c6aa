"""y = x Wᵀ + b, for one projection or several that read the same x, with or without low-rank updates.

`project` is the differentiable operation on projections, one step of autograd, however weights are stored and
however many there are. Projections that share their input (q, k, v; gate, up) save it once; their updates go through
the rank in one product (`low_rank`); and the gradients for x are added up by the matrix products themselves, where
autograd would sum tensors as wide as x. Saved for backward are x, the very tensor that its producer and its other
readers hold, if a gradient is made of it, and the narrow products of the updates; nothing of the output's width.
`project_gated` is the same for x = silu(gate) · up, which it makes, and makes again where memory counts more than time.
On a GPU it makes the updates of gate and up, too, which `project_to_gate` then leaves out (`ops.updated_swiglu`).

It is written so that weights may move between forward and backward. Under FSDP a Parameter's `.data` is a view of a
gather buffer that other blocks overwrite before backward comes. Whatever autograd saves of it would then be another
block's weight. So `project` keeps the *Parameter objects* and reads `.data` again in backward, when their unit has
gathered it anew. A weight's gradient goes straight to where it will be reduced from, if there is such a place
(`grad_slot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.grad_slot import deliver_product
from minift.model.low_rank import Updates
from minift.ops.swiglu import swiglu_backward_, swiglu_forward
from minift.ops.updated_swiglu import makes_updates, updated_swiglu, updated_swiglu_backward_

if TYPE_CHECKING:
    from minift.model.linear import LinearBase


def project(x: Tensor, *projections: LinearBase) -> list[Tensor]:
    """[projection(x) for projection in projections], as one operation if all of them have `parts`.

    x (..., in_features) -> each (..., out_features), in x's dtype, which is the stored weights'; the factors of updates
    may have another. Gradients come in the dtype of their parameter. Backward reads parameters as they are *then*.
    """
    call = _Call.of(projections)
    if call is None:
        return [projection(x) for projection in projections]
    outs = _run(call, x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), projections)
    return outs if x.ndim == 2 else [out_NO.view(*x.shape[:-1], out_NO.shape[-1]) for out_NO in outs]


def _run(call: _Call, x_NI: Tensor, projections: Sequence[LinearBase]) -> list[Tensor]:
    sums = _Project.apply(x_NI, None, None, call, *call.parameters())
    return [projection.after(sum_NO) for projection, sum_NO in zip(projections, sums, strict=True)]


class PendingUpdates(NamedTuple):
    """Updates that are yet to be made, of A's products (N, sum of ranks)."""

    updates: Updates
    hidden_NR: Tensor


def project_to_gate(x_NI: Tensor, gate: LinearBase, up: LinearBase) -> tuple[Tensor, Tensor, PendingUpdates | None]:
    """gate(x) and up(x), each (N, out_features), for `project_gated`; and the updates that it is to make, if that is
    faster.

    The gradients that come back are those of the whole, and so are all that are made of them.
    """
    call = _Call.of([gate, up])
    if call is None:
        return gate(x_NI), up(x_NI), None
    if gate.has_after or up.has_after or not call.can_defer(x_NI):
        return *_run(call, x_NI, [gate, up]), None
    call = replace(call, defers=True)
    gate_NO, up_NO, hidden_NR = _Project.apply(x_NI, None, None, call, *call.parameters())
    return gate_NO, up_NO, PendingUpdates(call.updates, hidden_NR)


def project_gated(
    gate_NI: Tensor,
    up_NI: Tensor,
    projection: LinearBase,
    keeps_product: bool,
    result_is_read: bool,
    pending: PendingUpdates | None = None,
) -> Tensor:
    """projection(silu(gate) · up), (N, out_features), as one operation, for a projection with `parts`.

    Like that, the gradient of gate takes the place of that of the product: one tensor less of a model's greatest width,
    at the moment when there are most of them. keeps_product: False: backward makes silu(gate) · up again, while it
    reads both. result_is_read: False: the result's values are left out, unless the projection itself reads them.
    pending: updates that gate and up lack.
    """
    call = _Call.of([projection], keeps_product, result_is_read)
    assert call is not None, f"{type(projection).__name__} has no parts"
    updates, hidden_NR = (None, None) if pending is None else pending
    call = replace(call, pending=updates)
    return projection.after(_Project.apply(gate_NI, up_NI, hidden_NR, call, *call.parameters())[0])


@dataclass(frozen=True)
class _Call:
    """What one call multiplies with, and how."""

    bases: Sequence[LinearBase]
    updates: Updates
    factors: Sequence[nn.Parameter]
    keeps_product: bool
    result_is_read: bool
    defers: bool = False
    """The updates are left to whoever reads the results."""
    pending: Updates | None = None
    """Those that have been left to this call, of gate and up."""

    @staticmethod
    def of(projections: Sequence[LinearBase], keeps_product: bool = True, result_is_read: bool = True) -> _Call | None:
        """None if one of them has no `parts`."""
        parts = [projection.parts() for projection in projections]
        if None in parts:
            return None
        reads_sum = any(projection.has_after for projection in projections)
        bases, updates = zip(*parts, strict=True)
        factors = [factor for of_one in updates for update in of_one for factor in (update.A, update.B)]
        return _Call(bases, Updates(updates), factors, keeps_product, result_is_read or reads_sum)

    def parameters(self) -> list[nn.Parameter | None]:
        """W, b of each projection, A, B of each update."""
        return [p for base in self.bases for p in (base.dense_parameter(), base.bias)] + list(self.factors)

    def can_defer(self, x_NI: Tensor) -> bool:
        """Whether there are updates, and one operation makes them and what follows."""
        ranks = self.updates.ranks(len(self.bases))
        return any(ranks) and makes_updates(self.bases[0].out_features, ranks, x_NI.dtype, x_NI.is_cuda)

    def gated(self, gate_NI: Tensor, up_NI: Tensor, hidden_NR: Tensor | None) -> Tensor:
        """silu(gate) · up; hidden: of what they lack."""
        if self.pending is None:
            return swiglu_forward(gate_NI, up_NI)
        return updated_swiglu(gate_NI, up_NI, *self.pending.terms_of_out(hidden_NR), self._counts())

    def _counts(self) -> list[int]:
        """How many updates gate lacks, and how many up."""
        return [len(of_one) for of_one in self.pending.ranks(2)]

    def dx(
        self,
        douts: Sequence[Tensor],
        dhidden_NR: Tensor | None,
        gate_up: tuple[Tensor, Tensor] | None,
        pending_NR: Tensor | None,
        need_product: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of x; of a product of gate and up instead those of both, and the product, if that is needed."""
        deferred = None
        if self.pending is not None and makes_updates(
            self.bases[0].in_features, self.updates.ranks(1), douts[0].dtype, douts[0].is_cuda
        ):
            deferred = self.updates.terms_of_dx(dhidden_NR)
        dx_NI = self.updates.dx(dhidden_NR) if deferred is None else None
        for base, dout_NO in zip(self.bases, douts, strict=True):
            dx_NI = base.product_dx(dout_NO, dx_NI)
        if gate_up is None:
            return dx_NI, None, None
        if self.pending is None:
            return swiglu_backward_(dx_NI, *gate_up, need_product)
        terms, of_dx = self.pending.terms_of_out(pending_NR), deferred or ([], [])
        narrows, factors = (ours + theirs for ours, theirs in zip(terms, of_dx, strict=True))
        return updated_swiglu_backward_(
            dx_NI, *gate_up, narrows, factors, [*self._counts(), len(of_dx[0])], need_product
        )


class _Project(torch.autograd.Function):
    """Its inputs are x and two Nones, or gate, up, of which it makes x, and perhaps what they lack; then the call and
    its parameters or Nones."""

    @staticmethod
    def forward(
        ctx,
        x_NI: Tensor,
        up_NI: Tensor | None,
        pending_NR: Tensor | None,
        call: _Call,
        *parameters: nn.Parameter | None,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.is_gated = call, up_NI is not None
        gate_NI = x_NI
        if ctx.is_gated:
            x_NI = call.gated(gate_NI, up_NI, pending_NR)
        hidden_NR = call.updates.hidden(x_NI)
        if call.result_is_read:
            # See [Note: updates first].
            sums = {} if call.defers else call.updates.out(hidden_NR, [base.bias for base in call.bases])
            outs = [base.product(x_NI, sums.get(index)) for index, base in enumerate(call.bases)]
        else:
            outs = [x_NI.new_zeros(()).expand(len(x_NI), base.out_features) for base in call.bases]
        needs_W, _, needs_A, needs_B = ctx.needs = _Project.needs(ctx)
        ctx.needs_dx = any(ctx.needs_input_grad[:2])
        reads_inputs = ctx.reads_x = any(needs_W) or any(needs_A)
        product_NI = ctx.product_NI = None
        if ctx.is_gated:
            reads_inputs = ctx.needs_dx or (ctx.reads_x and not call.keeps_product)
            if ctx.reads_x and call.keeps_product:
                # What gate and up can make again is given away by the first backward, while it still needs memory.
                product_NI, ctx.product_NI = (None, x_NI) if reads_inputs else (x_NI, None)
        ctx.save_for_backward(
            *((gate_NI, up_NI, pending_NR) if reads_inputs else (None,) * 3),
            hidden_NR if any(needs_B) else None,
            product_NI,
        )
        if not call.defers:
            return tuple(outs)
        ctx.mark_non_differentiable(hidden_NR)
        ctx.set_materialize_grads(False)
        return *outs, hidden_NR

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, up_NI, pending_NR, hidden_NR, product_NI = ctx.saved_tensors
        call, douts = ctx.call, douts[: len(ctx.call.bases)]
        gate_up, makes_product = None, False
        if ctx.is_gated:
            gate_up = x_NI, up_NI
            x_NI, ctx.product_NI = product_NI if ctx.product_NI is None else ctx.product_NI, None
            makes_product = x_NI is None and ctx.reads_x
        _, _, needs_A, needs_B = ctx.needs
        needs_dhidden = ctx.needs_dx or any(needs_A)
        dhidden_NR, of_B = call.updates.dhidden_and_gradients_of_B(douts, hidden_NR, needs_dhidden, needs_B)

        dx_NI = dup_NI = None
        if makes_product and ctx.needs_dx:  # who reads gate and up for their gradients makes it on the way
            dx_NI, dup_NI, x_NI = call.dx(douts, dhidden_NR, gate_up, pending_NR, True)
        elif makes_product:
            x_NI = call.gated(*gate_up, pending_NR)
        gradients = _Project.gradients_of_parameters(ctx, x_NI, douts, dhidden_NR, of_B)
        del x_NI, product_NI  # the product goes before the gradient of up comes
        if ctx.needs_dx and dx_NI is None:
            dx_NI, dup_NI, _ = call.dx(douts, dhidden_NR, gate_up, pending_NR, False)
        return dx_NI, dup_NI, None, None, *gradients

    @staticmethod
    def gradients_of_parameters(
        ctx, x_NI: Tensor | None, douts: Sequence[Tensor], dhidden_NR: Tensor | None, of_B: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """In the order of `_Call.parameters`."""
        needs_W, needs_b, needs_A, _ = ctx.needs
        gradients: list[Tensor | None] = []
        for base, dout_NO, needs_dW, needs_db in zip(ctx.call.bases, douts, needs_W, needs_b, strict=True):
            gradients.append(deliver_product(base.dense_parameter(), dout_NO.t(), x_NI) if needs_dW else None)
            gradients.append(dout_NO.sum(0) if needs_db else None)
        for pair in zip(ctx.call.updates.gradients_of_A(dhidden_NR, x_NI, needs_A), of_B, strict=True):
            gradients += pair
        return gradients

    @staticmethod
    def needs(ctx) -> tuple[tuple[bool, ...], ...]:
        """Which of the W, b, A and B need a gradient."""
        _, _, _, _, *needs = ctx.needs_input_grad
        border = 2 * len(ctx.call.bases)
        return tuple(needs[:border:2]), tuple(needs[1:border:2]), tuple(needs[border::2]), tuple(needs[border + 1 :: 2])
