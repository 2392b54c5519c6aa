"""out_i += scale_i · dropout(x) A_iᵀ B_iᵀ for the projections i of one x: LoRA and its relatives, forward and backward.

A direct chain (dropout, A, B, scale, add: what PEFT runs) makes a full-width temporary at each step, and autograd saves
most of them. Here every product is contracted through the rank first and is scaled on its narrow side (`ops.low_rank`),
for all projections at once:

    forward    h_i = c_i x A_iᵀ                   out_i = b_i + h_i B_iᵀ + x W_iᵀ      c_i = scale_i / (1 - p_i)
    backward   g_i = c_i dout_i B_i               dB_i = dout_iᵀ h_i
               dx = g_1 A_1 + g_2 A_2 + ..        dA_i = g_iᵀ x
                    + dout_1 W_1 + ..

[Note: updates first] The update is made first, and the product with the stored weight is added to it, never the other
way round: an update is bound by memory, so writing it should be all that it costs, and the large product has time to
read it while it multiplies. (To multiply [x, h] by [W, B] has the same end, but needs x and W in wider memory.) In 16
bits it is more exact, too: what is rounded on its own is the update, which is small, and not the product.

With dropout each update sees an x with zeros of its own, so the products with x are one for each of them. Nothing is
kept of a mask but the seed from which `ops.dropout` makes it again. Seeds come from torch's default CPU generator on
every device: the host never waits for them, and whoever replays that generator (recomputation) gets the same masks.

No autograd here, and nothing of stored weights: see `project`. A and B are Parameters and are read anew in backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minift.grad_slot import deliver, gradient_memory
from minift.ops.dropout import DROPOUT_STEPS, draw_seed, dropout, dropout_steps
from minift.ops.low_rank import factor_gradients_, from_rank, to_rank, to_rank_and_gradients_
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

    `douts` have an entry for each projection; `needs` and gradients one for each update, all those of the first
    projection first.
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

    def hidden(self, x_NI: Tensor) -> Tensor | None:
        """h (N, sum of ranks); None if there is no update."""
        if not self._terms:
            return None
        narrows = [
            to_rank([terms[0].seen(x_NI)], [term.A.t() for term in terms], [term.factor for term in terms])
            for terms in self._by_input(self._terms)
        ]
        return narrows[0] if len(narrows) == 1 else torch.cat(narrows, dim=1)

    def ranks(self, num_projections: int) -> list[list[int]]:
        """Those of each projection's updates."""
        ranks: list[list[int]] = [[] for _ in range(num_projections)]
        for term in self._terms:
            ranks[term.index].append(len(term.A))
        return ranks

    def terms_of_out(self, hidden_NR: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What `out` adds up, for one who adds it up himself: narrow matrices (N, r) and their B (out, r)."""
        return self._narrows(hidden_NR), [term.B for term in self._terms]

    def terms_of_dx(self, dhidden_NR: Tensor | None) -> tuple[list[Tensor], list[Tensor]] | None:
        """The same of `dx`: narrow matrices (N, r) and Aᵀ (in, r). None if dropout makes more than a sum of it."""
        if not self._share_x:
            return None
        return ([], []) if dhidden_NR is None else (self._narrows(dhidden_NR), [term.A.t() for term in self._terms])

    def out(self, hidden_NR: Tensor | None, biases: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """{index of a projection that has updates: their sum and its bias (N, out)}."""
        if not self._terms:
            return {}
        counts = Counter(term.index for term in self._terms)  # in their order
        sums = from_rank(
            self._narrows(hidden_NR), [term.B for term in self._terms], list(counts.values()),
            [biases[index] for index in counts],
        )  # fmt: skip
        return dict(zip(counts, sums, strict=True))

    def dhidden_and_gradients_of_B(
        self, douts: Sequence[Tensor], hidden_NR: Tensor | None, needs_dhidden: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """g (N, sum of ranks), the gradient of what the A_i give, unscaled; None if nobody needs it or there is no
        update. Then of each B that `needs` one its gradient, as `gradients_of_A` gives them.

        Together, for both are made of the douts, the widest matrices here, which are read once if all are needed.
        """
        terms = list(compress(self._terms, needs))
        memories = [gradient_memory(term.B) for term in terms]
        narrows = [hidden_NR[:, term.columns] for term in terms]
        wides, factors = [douts[term.index] for term in self._terms], [term.B for term in self._terms]
        scales = [term.factor for term in self._terms]
        dhidden_NR = None
        if needs_dhidden and terms and all(needs):
            dhidden_NR = to_rank_and_gradients_(wides, factors, scales, narrows, memories)
        else:
            if terms:
                factor_gradients_(memories, list(compress(wides, needs)), narrows)
            if needs_dhidden and wides:
                dhidden_NR = to_rank(wides, factors, scales)
        gradients = [deliver(term.B, memory) for term, memory in zip(terms, memories, strict=True)]
        return dhidden_NR, _spread(gradients, needs)

    def dx(self, dhidden_NR: Tensor | None) -> Tensor | None:
        """The updates' part (N, in) of the gradient of x; None if there is no update."""
        if not self._terms:
            return None
        if self._share_x:
            factors = [term.A.t() for term in self._terms]
            return from_rank(self._narrows(dhidden_NR), factors, [len(factors)], [None])[0]
        dx_NI = None
        for term, narrow in zip(self._terms, self._narrows(dhidden_NR), strict=True):
            part_NI = term.seen(mm(narrow, term.A.to(narrow.dtype)))
            dx_NI = part_NI if dx_NI is None else dx_NI.add_(part_NI)
            del part_NI  # before the next comes
        return dx_NI

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

    def _narrows(self, stacked_NR: Tensor) -> list[Tensor]:
        """What of (N, sum of ranks) belongs to each update."""
        return [stacked_NR[:, term.columns] for term in self._terms]

    def _by_input(self, terms: list[_Term]) -> list[list[_Term]]:
        """Those that see the same x together."""
        return [terms] if self._share_x and terms else [[term] for term in terms]


def _spread(gradients: list[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """`gradients` in the places where `needs` is true."""
    of_needed = iter(gradients)
    return [next(of_needed) if needed else None for needed in needs]
