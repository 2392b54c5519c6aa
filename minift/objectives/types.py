"""What every objective returns.

A loss is a **sum** together with the weight it was summed over; nobody but the training step divides, and it divides
once, by the weight of the whole optimizer step over all ranks and microbatches. A mean of means weighs a token by the
length of its microbatch; a sum does not, so the same global batch gives the same gradient however it is split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """Loss of one microbatch on this rank.

    loss_sum: 0-dim fp32 tensor, attached to the graph; call `(loss_sum / global_weight).backward()`. It is attached
        even when the microbatch has nothing to learn from (weight 0, loss 0), because every rank must run the same
        backward collectives.
    weight: how many things were summed (supervised tokens, preference pairs, ...).
    extra: further 0-dim detached **sums** to log, by name; they may be added over microbatches and ranks.
    """

    loss_sum: Tensor
    weight: int | float
    extra: dict[str, Tensor] = field(default_factory=dict)
