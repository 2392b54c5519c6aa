"""out_i += scale_i · dropout(x) A_iᵀ B_iᵀ for the projections i of one x: LoRA and its relatives, forward and backward.

A direct chain (dropout, A, B, scale, add: what PEFT runs) makes a full-width temporary at each step, and autograd saves
most of them. Here every product is contracted through the rank first, is scaled on its narrow side, and is added to its
destination as it is made (`ops.low_rank`), for all projections at once:

    forward    h_i = c_i x A_iᵀ                   out_i += h_i B_iᵀ              c_i = scale_i / (1 - p_i)
    backward   g_i = c_i dout_i B_i               dB_i = dout_iᵀ h_i
               dx += g_1 A_1 + g_2 A_2 + ..       dA_i = g_iᵀ x

With dropout each update sees an x with zeros of its own, so the products with x are one for each of them. Nothing is
kept of a mask but the seed from which `ops.dropout` makes it again. Seeds come from torch's default CPU generator on
every device: the host never waits for them, and whoever replays that generator (recomputation) gets the same masks.

No autograd here, and nothing of stored weights: see `linear`. A and B are Parameters and are read anew in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minift.grad_slot import deliver, gradient_memory
from minift.ops.dropout import DROPOUT_STEPS, draw_seed, dropout, dropout_steps
from minift.ops.low_rank import add_from_rank_, factor_gradients_, to_rank
from minift.ops.matmul import mm


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


class _Term(NamedTuple):
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
        rank = 0
        for index, of_one in enumerate(updates):
            for update in of_one:
                num_dropped = dropout_steps(update.dropout)
                factor = update.scale / (1.0 - num_dropped / DROPOUT_STEPS)
                seed = draw_seed() if num_dropped else 0
                columns = slice(rank, rank + len(update.A))
                self._terms.append(_Term(index, update.A, update.B, columns, factor, num_dropped, seed))
                rank = columns.stop
        self._share_x = all(term.num_dropped == 0 for term in self._terms)

    def add_(self, outs: Sequence[Tensor], x_NI: Tensor) -> Tensor | None:
        """Add the updates to `outs` in place; return h (N, sum of ranks) for backward, None if there is no update."""
        if not self._terms:
            return None
        narrows = [
            to_rank([terms[0].seen(x_NI)], [term.A.t() for term in terms], [term.factor for term in terms])
            for terms in self._by_input(self._terms)
        ]
        hidden_NR = narrows[0] if len(narrows) == 1 else torch.cat(narrows, dim=1)
        add_from_rank_(
            [outs[term.index] for term in self._terms],
            [hidden_NR[:, term.columns] for term in self._terms],
            [term.B for term in self._terms],
        )
        return hidden_NR

    def dhidden(self, douts: Sequence[Tensor]) -> Tensor | None:
        """g (N, sum of ranks): the gradient of what the A_i give, unscaled; None if there is no update."""
        if not self._terms:
            return None
        return to_rank(
            [douts[term.index] for term in self._terms],
            [term.B for term in self._terms],
            [term.factor for term in self._terms],
        )

    def add_dx_(self, dx_NI: Tensor, dhidden_NR: Tensor | None) -> None:
        """Add the updates' part of the gradient of x to `dx_NI` in place."""
        if self._share_x and self._terms:
            narrows = [dhidden_NR[:, term.columns] for term in self._terms]
            add_from_rank_([dx_NI], narrows, [term.A.t() for term in self._terms])
            return
        for term in self._terms:
            dx_NI.add_(term.seen(mm(dhidden_NR[:, term.columns], term.A.to(dx_NI.dtype))))

    def gradients_of_A(
        self, dhidden_NR: Tensor | None, x_NI: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Of each A that `needs` one; None also for those that have been delivered to a slot."""
        gradients: list[Tensor | None] = []
        for terms in self._by_input(list(compress(self._terms, needs))):
            memories = [gradient_memory(term.A) for term in terms]
            narrows = [dhidden_NR[:, term.columns] for term in terms]
            factor_gradients_([memory.t() for memory in memories], [terms[0].seen(x_NI)], narrows)
            gradients += [deliver(term.A, memory) for term, memory in zip(terms, memories, strict=True)]
        return _spread(gradients, needs)

    def gradients_of_B(
        self, douts: Sequence[Tensor], hidden_NR: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """As `gradients_of_A`."""
        terms = list(compress(self._terms, needs))
        memories = [gradient_memory(term.B) for term in terms]
        if terms:
            narrows = [hidden_NR[:, term.columns] for term in terms]
            factor_gradients_(memories, [douts[term.index] for term in terms], narrows)
        return _spread([deliver(term.B, memory) for term, memory in zip(terms, memories, strict=True)], needs)

    def _by_input(self, terms: list[_Term]) -> list[list[_Term]]:
        """Those that see the same x together."""
        return [terms] if self._share_x and terms else [[term] for term in terms]


def _spread(gradients: list[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """`gradients` in the places where `needs` is true."""
    of_needed = iter(gradients)
    return [next(of_needed) if needed else None for needed in needs]
