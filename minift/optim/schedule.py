"""Learning-rate schedules: a pure function of the optimizer step, so there is no state to save and no rank can drift.

During warm-up the factor grows linearly from 0; after it, over `total_steps - warmup_steps` steps,

    constant: 1        linear: m + (1 - m)(1 - p)        cosine: m + (1 - m)(1 + cos(pi p)) / 2

with p the finished part of that stretch and m = min_lr_ratio. Equal, for m = 0, to transformers'
`get_{constant,linear,cosine}_schedule_with_warmup` at every step up to `total_steps`, including its factor 0 at step 0
if there is a warm-up. Differs: from `total_steps` on the factor stays at m (transformers' cosine rises again).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minift.optim.config import OptimConfig, ScheduleName


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate: `lr(step) = config.lr * schedule(step)`.

    total_steps: optimizer steps of the whole run, warm-up included.
    """

    name: ScheduleName
    warmup_steps: int
    total_steps: int
    min_lr_ratio: float = 0.0

    @classmethod
    def from_config(cls, config: OptimConfig, total_steps: int) -> Schedule:
        """Raises ValueError if the warm-up is longer than the run, because lr would never be reached."""
        if config.warmup_steps > total_steps:
            raise ValueError(
                f"optim.warmup_steps is {config.warmup_steps}, but the run has {total_steps} steps; "
                f"valid: 0 to {total_steps}"
            )
        return cls(config.schedule, config.warmup_steps, total_steps, config.min_lr_ratio)

    def __call__(self, step: int) -> float:
        """Factor for the optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps) if step < self.total_steps else 1.0
        shape = 1.0 - done if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape
