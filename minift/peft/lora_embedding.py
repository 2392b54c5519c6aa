"""LoRA on a token embedding: the row of token t is E_t + s · B a_t, where a_t is column t of A (r, vocabulary).

Here A is zero at the start and B is random, as in PEFT and Microsoft's code: a column of A has a gradient only where
its token occurs. There is no dropout. The names and shapes are PEFT's; the rest is in `lora`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.model.embedding import Embedding
from minift.ops.matmul import mm
from minift.peft.adapter import AdapterModule


class LoraEmbedding(AdapterModule):
    """`lora_embedding_A` (r, vocabulary), `lora_embedding_B` (embedding_dim, r)."""

    def __init__(self, base: Embedding, rank: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(torch.empty(rank, base.num_embeddings, dtype=dtype, device=device))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, rank, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.base(tokens)
        update_ND = _Update.apply(
            tokens.reshape(-1), self.lora_embedding_A, self.lora_embedding_B, self.scale, out.dtype
        )
        return out + update_ND.view(out.shape)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        if local_name == "lora_embedding_A":
            return torch.zeros(self.lora_embedding_A.shape)
        return torch.empty(self.lora_embedding_B.shape).normal_(generator=generator)

    def effective_weight(self, weight: Tensor) -> Tensor:
        A, B = self.lora_embedding_A.to(weight.dtype), self.lora_embedding_B.to(weight.dtype)
        return torch.addmm(weight, A.t(), B.t(), alpha=self.scale)

    def extra_repr(self) -> str:
        rank, num_embeddings = self.lora_embedding_A.shape
        return f"{num_embeddings} x {len(self.lora_embedding_B)}, rank={rank}, scale={self.scale:g}"


class _Update(torch.autograd.Function):
    """s · B a_t for each token: (N, embedding_dim) in `dtype`."""

    @staticmethod
    def forward(
        ctx, tokens_N: Tensor, A_RV: nn.Parameter, B_DR: nn.Parameter, scale: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.A, ctx.B, ctx.scale = A_RV, B_DR, scale
        ctx.save_for_backward(tokens_N)
        return mm(_columns(A_RV, tokens_N, dtype), (scale * B_DR.detach()).to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        (tokens_N,), A_RV, B_DR = ctx.saved_tensors, ctx.A, ctx.B
        scaled_DR = (ctx.scale * B_DR.detach()).to(dout_ND.dtype)
        # Summed in fp32, as `model.embedding` does: a token may occur thousands of times.
        inner = torch.promote_types(dout_ND.dtype, torch.float32)
        dA_VR = torch.zeros(A_RV.shape[1], A_RV.shape[0], dtype=inner, device=dout_ND.device)
        dA_VR.index_add_(0, tokens_N, mm(dout_ND, scaled_DR).to(inner))
        dB_DR = ctx.scale * mm(dout_ND.t(), _columns(A_RV, tokens_N, dout_ND.dtype))
        return None, dA_VR.t().to(A_RV.dtype), dB_DR.to(B_DR.dtype), None, None


def _columns(A_RV: nn.Parameter, tokens_N: Tensor, dtype: torch.dtype) -> Tensor:
    """a_t of each token, (N, r)."""
    return A_RV.detach().index_select(1, tokens_N).t().to(dtype)
