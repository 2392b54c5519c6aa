"""out_i += scale_i · dropout(x) A_iᵀ B_iᵀ for the projections i of one x: LoRA and its relatives, forward and backward.

A direct chain (dropout, A, B, scale, add: what PEFT runs) makes a full-width temporary at each step, and autograd saves
most of them. Here every product is contracted through the rank first, is scaled on its narrow side, and goes into its
destination with `addmm_`. The A_i stand on top of each other and the h_i side by side, so that x is read once:

    forward    h = x [c_1 A_1; c_2 A_2; ..]ᵀ      out_i += h_i B_iᵀ              c_i = scale_i / (1 - p_i)
    backward   g_i = c_i dout_i B_i               dB_i = dout_iᵀ h_i
               dx += g [A_1; A_2; ..]             [dA_1; dA_2; ..] = gᵀ x

With dropout each update sees an x with zeros of its own, so the products with x are one for each of them. Nothing is
kept of a mask but the seed from which `ops.dropout` makes it again. Seeds come from torch's default CPU generator on
every device: the host never waits for them, and whoever replays that generator (recomputation) gets the same masks.

No autograd here, and nothing of stored weights: see `linear`. A and B are Parameters and are read anew in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.grad_slot import deliver_product, slot_of
from minift.ops.dropout import DROPOUT_STEPS, draw_seed, dropout, dropout_steps
from minift.ops.matmul import addmm_, mm


@dataclass(frozen=True)
class LowRank:
    """One update, by A (r, in) and B (out, r).

    They may have any float dtype; being small, they are cast to x's. dropout: the probability with which an element of
    x is zeroed on its way into A, in [0, 1), rounded to a multiple of 2^-16; 0 in evaluation.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True)
class _Term:
    """An update in one call: `index` of its projection, `columns` of h that are its own."""

    index: int
    A: nn.Parameter
    B: nn.Parameter
    columns: slice
    factor: float
    num_dropped: int  # of DROPOUT_STEPS
    seed: int

    def seen(self, x_NI: Tensor) -> Tensor:
        """x as this update sees it, with its zeros."""
        return dropout(x_NI, self.seed, self.num_dropped) if self.num_dropped else x_NI


class Updates:
    """The updates in one call of `project`: any number for each of its projections.

    `outs` and `douts` have an entry for each projection; `needs` and gradients one for each update, all those of the
    first projection first.
    """

    def __init__(self, updates: Sequence[Sequence[LowRank]]) -> None:
        self._terms: list[_Term] = []
        self._rank = 0
        for index, of_one in enumerate(updates):
            for update in of_one:
                columns = slice(self._rank, self._rank + len(update.A))
                num_dropped = dropout_steps(update.dropout)
                factor = update.scale / (1.0 - num_dropped / DROPOUT_STEPS)
                seed = draw_seed() if num_dropped else 0
                self._terms.append(_Term(index, update.A, update.B, columns, factor, num_dropped, seed))
                self._rank = columns.stop
        self._share_x = all(term.num_dropped == 0 for term in self._terms)

    def add_(self, outs: Sequence[Tensor], x_NI: Tensor) -> Tensor | None:
        """Add the updates to `outs` in place; return h (N, sum of ranks) for backward, None if there is no update."""
        if not self._terms:
            return None
        stacked_RI = x_NI.new_empty(self._rank, x_NI.shape[1])
        for term in self._terms:
            torch.mul(term.A, term.factor, out=stacked_RI[term.columns])
        hidden_NR = x_NI.new_empty(len(x_NI), self._rank)
        if self._share_x:
            mm(x_NI, stacked_RI.t(), out=hidden_NR)
        else:
            for term in self._terms:
                mm(term.seen(x_NI), stacked_RI[term.columns].t(), out=hidden_NR[:, term.columns])
        for term in self._terms:
            addmm_(outs[term.index], hidden_NR[:, term.columns], term.B.to(x_NI.dtype).t())
        return hidden_NR

    def dhidden(self, douts: Sequence[Tensor]) -> Tensor | None:
        """g (N, sum of ranks): the gradient of what the A_i give, unscaled; None if there is no update."""
        if not self._terms:
            return None
        dhidden_NR = douts[0].new_empty(len(douts[0]), self._rank)
        for term in self._terms:
            dout_NO = douts[term.index]
            addmm_(dhidden_NR[:, term.columns], dout_NO, term.B.to(dout_NO.dtype), beta=0.0, alpha=term.factor)
        return dhidden_NR

    def add_dx_(self, dx_NI: Tensor, dhidden_NR: Tensor | None) -> None:
        """Add the updates' part of the gradient of x to `dx_NI` in place."""
        if self._share_x and self._terms:
            addmm_(dx_NI, dhidden_NR, torch.cat([term.A.to(dx_NI.dtype) for term in self._terms]))
            return
        for term in self._terms:
            dx_NI.add_(term.seen(mm(dhidden_NR[:, term.columns], term.A.to(dx_NI.dtype))))

    def gradients_of_A(
        self, dhidden_NR: Tensor | None, x_NI: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Of each A that `needs` one; None also for those that have been delivered to a slot."""
        if self._share_x and sum(needs) > 1:
            stacked_RI = mm(dhidden_NR.t(), x_NI)
            return [
                _deliver(term.A, stacked_RI[term.columns]) if needed else None
                for term, needed in zip(self._terms, needs, strict=True)
            ]
        return [
            deliver_product(term.A, dhidden_NR[:, term.columns].t(), term.seen(x_NI)) if needed else None
            for term, needed in zip(self._terms, needs, strict=True)
        ]

    def gradients_of_B(
        self, douts: Sequence[Tensor], hidden_NR: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """As `gradients_of_A`."""
        return [
            deliver_product(term.B, douts[term.index].t(), hidden_NR[:, term.columns]) if needed else None
            for term, needed in zip(self._terms, needs, strict=True)
        ]


def _deliver(parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
    """`gradient`, for a backward to return: None if it went into a slot."""
    slot = slot_of(parameter)
    if slot is None:
        return gradient
    slot.add(gradient)
    return None
