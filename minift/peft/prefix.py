"""Prefix tuning: in every block, P trained keys and values stand before those of each document.

    softmax(q [K_P; k]ᵀ / √E) [V_P; v]

Papers: Li and Liang 2021, arXiv 2101.00190, section 4; without an MLP by default, as in P-tuning v2, Liu et al. 2021,
arXiv 2110.07602. What they leave open is as in PEFT: keys are used as they are, neither normed nor rotated; the tokens
of a document have the positions P, P+1, ..., and a sliding window counts the prefix among what came before; initial
values are normal with deviation 1. No initial value gives the model without a prefix, as keys of zero have their shares
of the softmax, too. But where they are what the base computes of words, as in section 7.4 of the first paper, the start
is the base that has read these words; a random one is a base that has lost its, and takes long to come back.

`projection`: one MLP makes the prefixes of all blocks from a small matrix (section 4.3 of the first paper):

    [K_P; V_P] of block l  =  tanh(e Wᵀ + b) W_lᵀ + b_l         e (P, K·E)    W (encoder_hidden_size, K·E)

e, W and b belong to all blocks; sharded, they are the root's. A file holds the prefixes that come out, as PEFT's does:
when it is read, the MLP is gone, and what can be trained on is the prefixes (PEFT refuses to).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.model.attention import Attention, Packing
from minift.model.embedding import Embedding
from minift.model.linear import Linear
from minift.peft.adapter import AdapterModule
from minift.peft.inject import adapter_modules, named_generator
from minift.peft.virtual_tokens import STORED_KEY, VirtualTokensConfig, attentions


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(VirtualTokensConfig):
    """Settings of prefix tuning.

    init: normal: keys and values with deviation 1. zero: keys and values of zero; with projection, its last layer.
        sample_vocab: those that the base computes for tokens drawn from its vocabulary. text: for those of `text`.
    projection: train an MLP that makes the prefixes, and store what it makes.
    encoder_hidden_size: width of that MLP; null: that of a block's keys.
    """

    method: Literal["prefix"] = "prefix"
    init: Literal["normal", "zero", "sample_vocab", "text"] = "normal"
    projection: bool = False
    encoder_hidden_size: int | None = None

    peft_type = "PREFIX_TUNING"
    parameter_names = ("prefix_keys", "prefix_values")
    kinds = (Attention,)
    peft_defaults = {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_hidden_size is not None and not (self.projection and self.encoder_hidden_size >= 1):
            raise ValueError(
                f"encoder_hidden_size is {self.encoder_hidden_size} and projection is {self.projection}; valid: 1 or "
                "more, with projection; or null"
            )
        if self.projection and self.starts_as_words:
            raise ValueError(
                f"init is {self.init!r} and projection is True, which makes prefixes that the base did not compute; "
                "valid: init normal or zero, or projection false"
            )

    @property
    def starts_as_words(self) -> bool:
        return self.init in ("sample_vocab", "text")

    def computed_values(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        if not self.starts_as_words:
            return {}
        ids = self.token_ids(model.config.vocab_size, named_generator(seed, "prefix"))
        blocks = model.keys_and_values(torch.tensor(ids))
        return {
            f"{name}.{local_name}": values
            for name, adapter in adapter_modules(model).items()
            for local_name, values in zip(self.parameter_names, blocks[adapter.base.layer], strict=True)
        }

    def wrap(self, name: str, base: Attention, dtype: torch.dtype, device: torch.device) -> PrefixAttention:
        return (ProjectedPrefixAttention if self.projection else PrefixAttention)(base, self, dtype, device)

    def wrap_all(self, bases: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, AdapterModule]:
        wrapped = super().wrap_all(bases, dtype)
        if self.projection:
            first, *others = wrapped.values()
            for adapter in others:
                adapter.encoder = first.encoder
        return wrapped

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {
            "encoder_hidden_size": self.encoder_hidden_size,
            "init_weights": "zero" if self.init == "zero" else None,
            "prefix_projection": self.projection,
        }

    def base_fields(self, model: nn.Module) -> dict[str, Any]:
        blocks = list(attentions(model).values())
        width = blocks[0].num_kv_heads * blocks[0].head_dim
        return {
            "encoder_hidden_size": self.encoder_hidden_size or width,
            "num_attention_heads": blocks[0].num_kv_heads,
            "num_layers": len(blocks),
            "token_dim": width,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        return cls(init="normal", **cls.checked_fields(fields))

    @property
    def parameter_sets(self) -> tuple[tuple[str, ...], ...]:
        return (("prefix_proj.weight", "prefix_proj.bias"),) if self.projection else super().parameter_sets

    def to_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = {name.partition(".encoder.")[2]: name for name in tensors if ".encoder." in name}
        modules = self.adapted_modules(tensors.keys() - encoder.values())
        if self.projection:
            hidden = _encoded({name: tensors[full_name] for name, full_name in encoder.items()})
            blocks = [[tensors[f"{module}.{local}"] for local in self.parameter_sets[0]] for module in modules]
            parts = [F.linear(hidden, weight, bias) for weight, bias in blocks]
        else:
            parts = [tensors[f"{module}.{local}"].flatten(1) for module in modules for local in self.parameter_names]
        return {STORED_KEY: torch.cat(parts, dim=1)}


class PrefixAttention(AdapterModule):
    """Attention with keys and values (P, K, E) of its own before every document's."""

    def __init__(self, base: Attention, config: PrefixConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        self.num_virtual_tokens = config.num_virtual_tokens
        self.init = config.init
        self.make_parameters(config, dtype, device)

    def make_parameters(self, config: PrefixConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (self.num_virtual_tokens, self.base.num_kv_heads, self.base.head_dim)
        self.prefix_keys = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.prefix_values = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def prefix(self) -> tuple[Tensor, Tensor]:
        """See `Attention.prefix`."""
        return self.prefix_keys, self.prefix_values

    def forward(self, hidden_TD: Tensor, packing: Packing) -> Tensor:
        # The rows of a cache begin with the prefix.
        return self.base(hidden_TD, packing, self.prefix() if packing.append is None else None)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(local_name).shape
        return torch.randn(shape, generator=generator) if self.init == "normal" else torch.zeros(shape)

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}"


class ProjectedPrefixAttention(PrefixAttention):
    """`encoder` is shared by all blocks, `prefix_proj` is this one's W_l and b_l."""

    def make_parameters(self, config: PrefixConfig, dtype: torch.dtype, device: torch.device) -> None:
        width = self.base.num_kv_heads * self.base.head_dim
        hidden_size = config.encoder_hidden_size or width
        with device:
            self.encoder = PrefixEncoder(self.num_virtual_tokens, width, hidden_size).to(dtype)
            self.prefix_proj = Linear(hidden_size, 2 * width, bias=True).to(dtype)

    def prefix(self) -> tuple[Tensor, Tensor]:
        heads = (2, self.base.num_kv_heads, self.base.head_dim)
        return self.prefix_proj(self.encoder()).unflatten(1, heads).unbind(1)

    def init_parameter(self, local_name: str, generator: torch.Generator) -> Tensor:
        shape = self.get_parameter(local_name).shape
        if local_name == "encoder.embedding.weight":
            return torch.randn(shape, generator=generator)
        if local_name.startswith("prefix_proj.") and self.init == "zero":
            return torch.zeros(shape)
        projection, _, _ = local_name.rpartition(".")
        bound = 1.0 / math.sqrt(self.get_submodule(projection).in_features)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class PrefixEncoder(nn.Module):
    """tanh(e Wᵀ + b), (P, hidden_size)."""

    def __init__(self, num_virtual_tokens: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = Embedding(num_virtual_tokens, width)
        self.hidden_proj = Linear(width, hidden_size, bias=True)

    def forward(self) -> Tensor:
        weight = self.embedding.weight
        return self.hidden_proj(self.embedding(torch.arange(len(weight), device=weight.device))).tanh()


def _encoded(tensors: Mapping[str, Tensor]) -> Tensor:
    """What a `PrefixEncoder` with these parameters gives. ValueError if one is missing."""
    names = ("embedding.weight", "hidden_proj.weight", "hidden_proj.bias")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"the adapter lacks encoder.{missing[0]}")
    return F.linear(*(tensors[name] for name in names)).tanh()
