"""Three spellings of one parameter name, and the pure functions between them.

    in memory             model.layers.0.mlp.up_proj.base.weight    the base weight
                          model.layers.0.mlp.up_proj.lora_A.weight  an adapter weight
    Hugging Face folder   model.layers.0.mlp.up_proj.weight
    PEFT adapter file     base_model.model.model.layers.0.mlp.up_proj.lora_A.weight

An adapter holds the projection that it wraps under the attribute `base`, and nothing else in a model has that name.
"""

from __future__ import annotations

_PEFT_PREFIX = "base_model.model."


def canonical_name(fqn: str) -> str:
    """In-memory name -> the name without wrappers: for a base parameter, its name in the Hugging Face folder."""
    return ".".join(segment for segment in fqn.split(".") if segment != "base")


def peft_key(fqn: str) -> str:
    """In-memory name of an adapter parameter -> its key in `adapter_model.safetensors`."""
    return _PEFT_PREFIX + canonical_name(fqn)


def fqn_of_peft_key(key: str) -> str:
    """Inverse of `peft_key`. ValueError for a key that is not of a wrapped causal language model."""
    if not key.startswith(_PEFT_PREFIX):
        raise ValueError(f"adapter tensor {key!r} does not start with {_PEFT_PREFIX!r}: not from PEFT for a causal LM")
    return key.removeprefix(_PEFT_PREFIX)


def in_model_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: as text, but numbers by their value, so that layers.10 comes after layers.2."""
    return [(int(segment), "") if segment.isdigit() else (-1, segment) for segment in name.split(".")]
