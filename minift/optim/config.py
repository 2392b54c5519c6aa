"""What a user may say about the optimizer and the learning rate.

Hyper-parameters per parameter are given by *patterns*: regular expressions that are searched (`re.search`) in the full
parameter name, e.g. `model.layers.3.self_attn.q_proj.lora_B.weight`. LoRA+ is `lr_ratios={"lora_B": 16.0}`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ScheduleName = Literal["constant", "linear", "cosine"]
StateName = Literal["fp32", "8bit"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule.

    lr: peak learning rate.
    betas: decay rates of the first and second moment.
    eps: added to the square root of the second moment.
    weight_decay: decoupled: a weight is multiplied by 1 - lr * weight_decay in each step.
    no_decay: patterns of parameters without weight decay (default: norm weights and biases, where there are any).
    lr_ratios: pattern -> factor on lr; the first pattern that matches a name counts; 0 freezes.
    schedule: what follows the warm-up: constant, linear or cosine, down to min_lr_ratio at the last step.
    warmup_steps: optimizer steps in which lr grows linearly from 0.
    min_lr_ratio: lr at the end of linear and cosine, as a part of lr.
    max_grad_norm: the global gradient norm is clipped to this; null: no clipping.
    rounding_seed: seed of stochastic rounding (precision.stochastic_rounding), all that is random here.
    state: what both moments are kept in; fp32: 8 bytes per weight. 8bit: 2, block-wise codes as bitsandbytes keeps
        them; parameters below 4096 elements stay fp32.
    paged: keep the moments in host memory (GPU) or in a temporary file mapped into memory (CPU), and bring them in
        piece by piece during the update: slower, and they do not count when memory is short. The same updates.
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = (r"norm\.weight$", r"bias$")
    lr_ratios: dict[str, float] = field(default_factory=dict)
    schedule: ScheduleName = "linear"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    rounding_seed: int = 0
    state: StateName = "fp32"
    paged: bool = False

    def __post_init__(self) -> None:
        rules = {
            "lr": (_is_finite(self.lr) and self.lr > 0, "a finite number > 0"),
            "betas": (_is_list(self.betas, lambda b: _is_finite(b) and 0 <= b < 1, length=2), "two numbers in [0, 1)"),
            "eps": (_is_finite(self.eps) and self.eps > 0, "a finite number > 0"),
            "weight_decay": (_is_finite(self.weight_decay) and self.weight_decay >= 0, "a finite number >= 0"),
            "no_decay": (_is_list(self.no_decay, _is_pattern), "a list of regular expressions"),
            "lr_ratios": (
                isinstance(self.lr_ratios, dict)
                and all(_is_pattern(p) and _is_finite(ratio) and ratio >= 0 for p, ratio in self.lr_ratios.items()),
                "regular expression -> finite number >= 0",
            ),
            "schedule": (self.schedule in get_args(ScheduleName), ", ".join(get_args(ScheduleName))),
            "warmup_steps": (isinstance(self.warmup_steps, int) and self.warmup_steps >= 0, "an integer >= 0"),
            "min_lr_ratio": (_is_finite(self.min_lr_ratio) and 0 <= self.min_lr_ratio <= 1, "a number in [0, 1]"),
            "max_grad_norm": (
                self.max_grad_norm is None or (_is_finite(self.max_grad_norm) and self.max_grad_norm > 0),
                "a finite number > 0, or null for no clipping",
            ),
            "rounding_seed": (isinstance(self.rounding_seed, int), "an integer"),
            "state": (self.state in get_args(StateName), ", ".join(get_args(StateName))),
            "paged": (isinstance(self.paged, bool), "true or false"),
        }
        for name, (holds, valid) in rules.items():
            if not holds:
                raise ValueError(f"optim.{name} is {self.__dict__[name]!r}; valid: {valid}")

    def lr_ratio(self, name: str) -> float:
        """Factor on lr for the parameter `name`."""
        return next((ratio for pattern, ratio in self.lr_ratios.items() if re.search(pattern, name)), 1.0)

    def decay(self, name: str) -> float:
        """Weight decay of the parameter `name`."""
        return 0.0 if any(re.search(pattern, name) for pattern in self.no_decay) else self.weight_decay

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse an `lr_ratios` pattern that is the first match of none of the trainable parameters, and a `no_decay`
        pattern that matches none, except for the defaults: they are for any model, also one without biases.

        names: those of the whole model. A rank that passed the names in its own shards would fail alone.
        """
        names = list(names)
        first_matches = {next((p for p in self.lr_ratios if re.search(p, name)), None) for name in names}
        for pattern in self.lr_ratios:
            if pattern not in first_matches:
                raise ValueError(
                    f"optim.lr_ratios has the pattern {pattern!r}, which decides the learning rate of no trainable "
                    f"parameter; valid: a pattern found in one of {len(names)} names such as {', '.join(names[:3])}"
                )
        for pattern in self.no_decay:
            if pattern not in OptimConfig.no_decay and not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"optim.no_decay has the pattern {pattern!r}, found in the name of no trainable parameter; "
                    f"valid: one found in one of {len(names)} names, nearest: {', '.join(_nearest(pattern, names))}"
                )


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Ends of `names`, of one part or two, that are spelled most like it."""
    ends = {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)}
    return difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.0)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: object, is_valid: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, (tuple, list)) and length in (None, len(value)) and all(map(is_valid, value))


def _is_pattern(pattern: object) -> bool:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError):
        return False
    return True
