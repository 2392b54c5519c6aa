"""Prompt tuning: P trained embeddings stand before every document.

Paper: Lester et al. 2021, arXiv 2104.08691, section 2. They start as words, of the vocabulary at random or of a text
(`sample_vocab` and `text`, as in PEFT), or as PEFT's default, `random`: normal with deviation 1, far from any word.

Virtual tokens go through the model as others do, but once for a pack, and their positions are 0 to P-1. The head does
not see them, so they predict nothing, and targets stay where they are. (With dynamic NTK, the frequencies that they are
turned by are those of a document of P tokens; transformers takes the whole document's, where it is longer than the
model was trained for.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from minift.model.embedding import Embedding
from minift.peft.adapter import AdapterModule, BaseWeight
from minift.peft.virtual_tokens import STORED_KEY, VirtualTokensConfig, attentions


@dataclass(frozen=True, kw_only=True)
class PromptConfig(VirtualTokensConfig):
    """Settings of prompt tuning.

    init: random: normal values. sample_vocab: embeddings of tokens drawn from the vocabulary. text: those of `text`.
    """

    method: Literal["prompt"] = "prompt"
    init: Literal["random", "sample_vocab", "text"] = "sample_vocab"

    peft_type = "PROMPT_TUNING"
    parameter_names = ("prompt_embeddings",)
    kinds = (Embedding,)
    peft_defaults = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }

    def wrap(self, name: str, base: Embedding, dtype: torch.dtype, device: torch.device) -> PromptedEmbedding:
        return PromptedEmbedding(base, self, dtype, device)

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {
            "prompt_tuning_init": self.init.upper(),
            "prompt_tuning_init_text": self.text,
            "tokenizer_name_or_path": self.tokenizer,
        }

    def base_fields(self, model: nn.Module) -> dict[str, Any]:
        blocks = list(attentions(model).values())
        (embedding,) = self.candidates(model).values()
        return {
            "num_attention_heads": blocks[0].num_heads,
            "num_layers": len(blocks),
            "token_dim": embedding.embedding_dim,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        return cls(init="random", **cls.checked_fields(fields))

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (module,) = self.adapted_modules(tensors)
        return {STORED_KEY: tensors[f"{module}.prompt_embeddings"]}


class PromptedEmbedding(AdapterModule):
    """tokens (T) -> (P + T, D), virtual tokens first."""

    def __init__(self, base: Embedding, config: PromptConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.num_virtual_tokens = config.num_virtual_tokens
        shape = (config.num_virtual_tokens, base.embedding_dim)
        self.prompt_embeddings = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def forward(self, tokens_T: Tensor) -> Tensor:
        hidden_TD = self.base(tokens_T)
        return torch.cat([self.prompt_embeddings.to(hidden_TD.dtype), hidden_TD])

    def init_from_base(self, local_name: str, generator: torch.Generator, base_weight: BaseWeight) -> Tensor:
        if self.config.init == "random":
            return torch.randn(self.prompt_embeddings.shape, generator=generator)
        ids = self.config.token_ids(self.base.num_embeddings, generator)
        width = self.base.embedding_dim
        return torch.stack([base_weight(index * width, (index + 1) * width).float().cpu() for index in ids])

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, init={self.config.init}"
