"""Dynamic loss scaling, which fp16 needs and nothing else does.

fp16 ends at 2^-24 below and at 65504 above, and the gradients of a fine-tuning step reach below. The loss is multiplied
by a scale before backward, so all gradients are, and divided by it in the update, in fp32. The best scale is the
largest that lets nothing overflow, and it changes during a run, so it is searched for: every overflow skips the step
and halves the scale, and 2000 steps without one double it (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2).

    (loss * scaler.scale).backward()
    norm = grad_norm(...) / scaler.scale                          # global, so equal on every rank
    optimizer.step(lr_scale, clip_factor(norm) / scaler.scale)    # NaN if the norm is not finite: nothing is updated
    overflowed = not isfinite(norm)
    if overflowed:
        optimizer.take_back_step()
    scaler.update(overflowed)

Scales as `torch.amp.GradScaler` does, step by step. Differs: overflows are seen in the global gradient norm, which the
step computes anyway and which every rank knows, so there is neither a pass over the gradients nor a collective of its
own. Dividing by the scale is a factor of the update (`AdamW.step`). Scale and factors are powers of two, which makes
scaling exact and the scale a plain float, and the scale is bounded.
"""

from __future__ import annotations

import math
from typing import Any

MIN_SCALE = 2.0**-10
MAX_SCALE = 2.0**64


class LossScaleError(ArithmeticError):
    """Gradients overflow whatever the loss scale."""


class LossScaler:
    """The scale of the loss, and when it changes.

    Args:
        initial_scale: of the first step. It settles within tens of steps.
        growth_factor: by which the scale grows.
        backoff_factor: by which it shrinks after an overflow.
        growth_interval: steps in a row without overflow after which it grows.

    Above `MAX_SCALE` it does not grow: fp32 holds the inverse, and gradients that small are zero. An overflow at
    `MIN_SCALE` raises `LossScaleError`: a gradient that is infinite at every scale is not a matter of range, and steps
    would be skipped without end.
    """

    def __init__(
        self,
        initial_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        rules = {
            "initial_scale": (
                initial_scale,
                _is_power_of_two(initial_scale) and MIN_SCALE <= initial_scale <= MAX_SCALE,
                f"a power of two from {MIN_SCALE:g} to {MAX_SCALE:g}",
            ),
            "growth_factor": (growth_factor, _is_power_of_two(growth_factor) and growth_factor > 1, "2, 4, 8, ..."),
            "backoff_factor": (
                backoff_factor, _is_power_of_two(backoff_factor) and backoff_factor < 1, "0.5, 0.25, 0.125, ..."
            ),
            "growth_interval": (growth_interval, _is_int(growth_interval, least=1), "an integer >= 1"),
        }  # fmt: skip
        for name, (value, holds, valid) in rules.items():
            if not holds:
                raise ValueError(f"loss scaler: {name} is {value!r}; valid: {valid}")
        self.scale = float(initial_scale)
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._good_steps = 0  # in a row, since the scale last changed
        self._skipped_steps = 0  # in a row, up to now

    def update(self, overflowed: bool) -> None:
        """Once per step, after it was done or, if a gradient `overflowed`, skipped. Raises `LossScaleError`."""
        if overflowed:
            self._good_steps = 0
            self._skipped_steps += 1
            if self.scale <= MIN_SCALE:
                raise LossScaleError(
                    f"gradients are infinite or NaN at the smallest loss scale, {self.scale:g}, after "
                    f"{self._skipped_steps} skipped steps in a row: activations or weights have left the range of "
                    "float16 (65504) or are NaN. Try precision.wire bfloat16 or float32, or a smaller learning rate"
                )
            self.scale = max(self.scale * self._backoff_factor, MIN_SCALE)
            return
        self._skipped_steps = 0
        self._good_steps += 1
        if self._good_steps == self._growth_interval:
            self._good_steps = 0
            self.scale = min(self.scale * self._growth_factor, MAX_SCALE)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, for JSON."""
        return {"scale": self.scale, "good_steps": self._good_steps, "skipped_steps": self._skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError, changing nothing, unless it is one."""
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"loss scaler state has {sorted(state)}; valid: exactly {sorted(expected)}")
        scale, good_steps, skipped_steps = (state[key] for key in expected)
        if not (_is_power_of_two(scale) and MIN_SCALE <= scale <= MAX_SCALE):
            raise ValueError(
                f"loss scaler state has scale {scale!r}; valid: a power of two from {MIN_SCALE:g} to {MAX_SCALE:g}"
            )
        for key in ("good_steps", "skipped_steps"):
            if not _is_int(state[key], least=0):
                raise ValueError(f"loss scaler state has {key} {state[key]!r}; valid: an integer >= 0")
        # With a shorter growth_interval than before, growth is due at once and not never.
        self.scale = float(scale)
        self._good_steps = min(good_steps, self._growth_interval - 1)
        self._skipped_steps = skipped_steps


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_power_of_two(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return value > 0 and math.frexp(value)[0] == 0.5
