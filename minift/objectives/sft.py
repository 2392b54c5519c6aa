"""Supervised fine-tuning and language modelling: cross entropy of the tokens that the data says are to be predicted.

Both are this one function. They differ in the batch's targets: continued pre-training supervises every token,
fine-tuning the assistant's. Objectives know the model as a callable and the batch by the fields that are used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from minift.objectives.cross_entropy import linear_cross_entropy
from minift.objectives.types import LossSum


class TokenBatch(Protocol):
    """What is used of a packed microbatch (`data.batch.Batch`): T tokens of S documents."""

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    targets_T: Tensor
    num_targets: int


class SupervisedTokens:
    """Sum of -log p over the supervised tokens of a microbatch.

    chunk_tokens: see `linear_cross_entropy`.
    """

    def __init__(self, chunk_tokens: int | None = None) -> None:
        self.chunk_tokens = chunk_tokens

    def weight(self, batch: TokenBatch) -> int:
        """Number of supervised tokens, known without running the model."""
        return batch.num_targets

    def __call__(self, model: Callable[..., Tensor], batch: TokenBatch) -> LossSum:
        """One forward of `model` (a `CausalLM` or a wrapper with its signature). The head runs inside of it."""
        loss_sum = model(
            batch.tokens_T,
            batch.positions_T,
            batch.cu_seqlens,
            batch.max_seqlen,
            head=lambda hidden_TD, lm_head: linear_cross_entropy(
                hidden_TD, lm_head, batch.targets_T, self.chunk_tokens, batch.num_targets
            ),
        )
        return LossSum(loss_sum, self.weight(batch))
