"""Token embedding whose backward needs the token ids and nothing else.

PyTorch's CPU kernel adds up the gradients of a token's occurrences in the weight's dtype; in bf16 the sum of a frequent
token stops growing after a few hundred. Here rows are summed in fp32 and rounded once. On a GPU they are added one by
one to an fp32 slot, so that there is no gradient as large as the table beside it; where there is none, PyTorch's CUDA
kernel sums them up, in fp32 if they are more than 3072, else in parts of 32.

Differs from transformers: the padding token is a token like any other (a packed batch has no padding), so its row gets
a gradient where it occurs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.grad_slot import slot_of


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.weight = weight_VD
        ctx.vocab_size = weight_VD.shape[0]
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor | None]:
        (tokens,) = ctx.saved_tensors
        slot = slot_of(ctx.weight)
        if dy.is_cuda:  # no list of distinct tokens here: the host would wait for its length
            if slot is None:
                return None, torch.ops.aten.embedding_dense_backward(dy, tokens, ctx.vocab_size, -1, False)
            slot.add_repeated_rows(tokens.reshape(-1), dy.reshape(-1, dy.shape[-1]))
            return None, None
        seen_U, row_of_token_N = tokens.reshape(-1).unique(return_inverse=True)
        sums_UD = torch.zeros(len(seen_U), dy.shape[-1], dtype=torch.float32, device=dy.device)
        sums_UD.index_add_(0, row_of_token_N, dy.reshape(-1, dy.shape[-1]).float())
        if slot is not None:
            slot.add_rows(seen_U, sums_UD.to(dy.dtype))
            return None, None
        dweight_VD = dy.new_zeros(ctx.vocab_size, dy.shape[-1])
        dweight_VD[seen_U] = sums_UD.to(dy.dtype)
        return None, dweight_VD


class Embedding(nn.Module):
    """tokens (...) int64 -> (..., embedding_dim); `weight` (num_embeddings, embedding_dim) starts uninitialised."""

    num_virtual_tokens = 0
    """Rows that an adapter in this one's place puts before those of the tokens (T), see `decoder`."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return _Embedding.apply(tokens, self.weight)

    def dense_weight(self) -> Tensor:
        """The weight without gradient history, as a projection has it."""
        return self.weight.detach()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}"
