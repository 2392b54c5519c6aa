"""What all methods share of `adapter_config.json`, as PEFT 0.21.2 writes it: the common keys, and strict reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def required(fields: Mapping[str, Any], key: str, method: str) -> Any:
    """fields[key]; ValueError if it is not there or null."""
    if fields.get(key) is None:
        raise ValueError(f"adapter_config.json has no {key!r}, which {method} needs")
    return fields[key]


def as_int(value: float) -> int | float:
    """16.0 -> 16: PEFT writes alpha as an integer, and readers less lenient than PEFT expect one."""
    return int(value) if float(value).is_integer() else value


def in_order(patterns: str | list[str] | None) -> str | list[str] | None:
    """Names sorted: PEFT holds them as a set, and writes them in any order."""
    return sorted(patterns) if isinstance(patterns, (list, tuple)) else patterns
