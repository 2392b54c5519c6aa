"""What all methods share of `adapter_config.json`, as PEFT 0.21.2 writes it: the common keys, and strict reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from minift.recipe.describe import describe, is_union

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": "CAUSAL_LM",
}
"""Written by every method. Their values do not change what the stored tensors mean, so any are read."""
SELECTION = {"exclude_modules", "modules_to_save", "target_modules"}
"""Written by every method too; what they say is a setting."""


def refuse_unsupported(fields: Mapping[str, Any], written: Mapping[str, Any], understood: set[str]) -> None:
    """ValueError for a key of `fields` that asks for something: it is not `understood`, not as `written` by minift, and
    not empty or false, as the switch of a later version of PEFT is that is off."""
    for key, value in fields.items():
        if key in understood or key in COMMON or value == written.get(key) or not value:
            continue
        raise ValueError(f"adapter_config.json sets {key!r} to {value!r}, which minift does not support")


def required(fields: Mapping[str, Any], key: str, hint: Any, method: str) -> Any:
    """fields[key], of the declared type `hint`; ValueError if it is not there or null, or of another type."""
    if fields.get(key) is None:
        raise ValueError(f"adapter_config.json has no {key!r}, which {method} needs")
    return optional(fields, key, hint, None)


def optional(fields: Mapping[str, Any], key: str, hint: Any, default: Any) -> Any:
    """Likewise, and `default` if it is not there or null."""
    value = fields.get(key)
    if value is None:
        return default
    if not _is(value, hint):
        raise ValueError(f"{key} is {value!r}; valid: {describe(hint)}")
    return value


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a declared type. A whole number is a number; true and false are none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_union(hint):
        return any(_is(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, arguments[1]) for item in value.values())
    return type(value) in ((int, float) if hint is float else (hint,))


def as_int(value: float) -> int | float:
    """16.0 -> 16: PEFT writes alpha as an integer, and readers less lenient than PEFT expect one."""
    return int(value) if float(value).is_integer() else value


def in_order(patterns: str | list[str] | None) -> str | list[str] | None:
    """Names sorted: PEFT holds them as a set, and writes them in any order."""
    return sorted(patterns) if isinstance(patterns, (list, tuple)) else patterns
