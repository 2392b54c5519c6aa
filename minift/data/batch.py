"""Packing: documents laid end to end, and nothing else.

One microbatch is a single row of tokens without padding. Where documents begin is told by `cu_seqlens`; attention never
looks across it, positions restart at it, and no target reaches over it (learning to guess the first word of the next
document from the last word of this one is noise). With E the end-of-sequence token, `.` a token that is not supervised:

    documents    [p q A E]  [r B E]          capital letters are supervised
    tokens_T      p q A E    r B E
    positions_T   0 1 2 3    0 1 2
    cu_seqlens    0          4        7
    targets_T     . A E .    B E .           what position t must predict: already shifted by one, inside each document

That `targets_T` is shifted here, once, means that no objective shifts anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minift.data.documents import Encoded

IGNORE = -100
"""Target of a position that has nothing to predict (the value PyTorch's cross entropy ignores by default)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One packed microbatch of T tokens in S documents.

    tokens_T     int64 (T,)
    positions_T  int64 (T,), 0 at the start of every document
    cu_seqlens   int32 (S + 1,), first token of each document, then T
    max_seqlen   tokens in the longest document
    targets_T    int64 (T,), the token that position t must predict, or IGNORE
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    targets_T: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @cached_property
    def num_targets(self) -> int:
        """Supervised predictions in this microbatch: its weight in the loss."""
        return int((self.targets_T != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        moved = replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=True),
            positions_T=self.positions_T.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            targets_T=self.targets_T.to(device, non_blocking=True),
        )
        moved.__dict__["num_targets"] = self.num_targets  # counted on the host: asking the device would wait for it
        return moved


def pack(documents: Sequence[Encoded]) -> Batch:
    """Documents, in the given order, as one microbatch. Without any document: `idle_batch()`."""
    if not documents:
        return idle_batch()
    lengths = np.array([len(document.tokens) for document in documents])
    assert lengths.min() > 0, "documents are never empty (Documents.from_encoded refuses them)"
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.concatenate([document.tokens for document in documents]).astype(np.int64)
    supervised = np.concatenate([document.targets_mask for document in documents])

    targets = np.full_like(tokens, IGNORE)
    targets[:-1][supervised[1:]] = tokens[1:][supervised[1:]]
    targets[ends - 1] = IGNORE  # the last token of a document must not predict the first of the next
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        targets_T=torch.from_numpy(targets),
    )


def idle_batch() -> Batch:
    """One token (id 0) and no target: what a rank runs when it has no document left.

    Collectives need every rank in every microbatch; a batch without targets adds exactly nothing to the loss, the
    gradient and the divisor.
    """
    return pack([Encoded(np.zeros(1, np.int32), np.zeros(1, bool))])
