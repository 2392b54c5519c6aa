"""What prefix tuning and prompt tuning share: P virtual tokens before every document, one tensor in a file.

The model knows where virtual tokens stand, which positions follow, and that a pack holds them once ([Note: virtual
tokens] in `model.decoder`); the methods supply them. PEFT stores them as `prompt_embeddings` (P, ...), without what its
other tensors' names begin with, and writes the base's sizes into `adapter_config.json`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minift.data.tokenizer import Tokenizer
from minift.model.attention import Attention
from minift.peft.adapter import AdapterConfig
from minift.peft.patterns import ALL_LINEAR
from minift.peft.peft_json import COMMON, refuse_unsupported, required

STORED_KEY = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(AdapterConfig):
    """Settings of both.

    num_virtual_tokens: how many stand before every document, P; each takes a position of the model's.
    text: for init text: its first tokens, repeated if they are too few.
    tokenizer: for init text: folder with the tokenizer that cuts it; null: the model's.
    """

    num_virtual_tokens: int = 20
    init: str
    text: str | None = None
    tokenizer: str | None = None

    peft_defaults: ClassVar[dict[str, Any]]
    """Keys of `adapter_config.json` that only this method has."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens is {self.num_virtual_tokens}; valid: 1 or more")
        selection = {"targets": self.targets, "exclude": self.exclude, "modules_to_save": self.modules_to_save}
        for name, value in selection.items():
            if value and value != ALL_LINEAR:
                raise ValueError(f"{name} is {value!r}, but {self.method} tuning chooses no modules; leave it out")
        if (self.init == "text") != bool(self.text):
            raise ValueError(
                f"init is {self.init!r} and text is {self.text!r}; valid: a text with init text, and only then"
            )
        if self.tokenizer is not None and self.init != "text":
            raise ValueError(f"tokenizer is {self.tokenizer!r}, but init is {self.init!r}; valid: with init text")

    def for_base(self, folder: str) -> Self:
        return replace(self, tokenizer=folder) if self.init == "text" and self.tokenizer is None else self

    def token_ids(self, vocab_size: int, generator: torch.Generator) -> list[int]:
        """P tokens: of `text`, as PEFT takes them, with BOS, if that is what the tokenizer begins a text with; or drawn
        from the vocabulary."""
        if self.init != "text":
            return torch.randint(vocab_size, (self.num_virtual_tokens,), generator=generator).tolist()
        if self.tokenizer is None:
            raise ValueError("init is 'text' and tokenizer is null, and there is no model folder; give the tokenizer's")
        tokenizer = Tokenizer.from_folder(self.tokenizer)
        ids = ([tokenizer.bos_id] if tokenizer.adds_bos else []) + tokenizer.encode(self.text)
        if not ids:
            raise ValueError(f"text is {self.text!r}, of which the tokenizer makes no token")
        return list(itertools.islice(itertools.cycle(ids), self.num_virtual_tokens))

    def to_peft(self) -> dict[str, Any]:
        return COMMON | self.peft_defaults | {
            "modules_to_save": None,
            "num_attention_heads": None,
            "num_layers": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.num_virtual_tokens,
            "peft_type": self.peft_type,
            "token_dim": None,
        }  # fmt: skip

    @classmethod
    def checked_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `fields` of a file have in common. How the tensors came about no longer matters: initial
        values, an MLP that made them; and their shapes are the tensors'."""
        understood = {"num_attention_heads", "num_layers", "num_virtual_tokens", "peft_type", "token_dim"}
        refuse_unsupported(fields, {"num_transformer_submodules": 1}, understood | cls.peft_defaults.keys())
        return {"num_virtual_tokens": required(fields, "num_virtual_tokens", int, cls.peft_type)}

    def from_stored(self, stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        rest = dict(stored)
        whole = rest.pop(STORED_KEY, None)
        if whole is None:
            return rest
        columns = [math.prod(shape[1:]) for shape in shapes.values()]
        expected = (self.num_virtual_tokens, sum(columns))
        if whole.shape != expected:
            raise ValueError(
                f"{STORED_KEY} is {tuple(whole.shape)}, the model needs {expected}: made for another base?"
            )
        parts = whole.split(columns, dim=1)
        return rest | {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


def attentions(model: nn.Module) -> dict[str, Attention]:
    """Full name -> module, in the model's order; one for each block."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
