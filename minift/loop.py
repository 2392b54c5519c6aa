"""The section `loop` of a recipe. What is done with it: `train`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minift.checkpoint.saver import STAGING_BYTES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much per step, and what happens when."""

    examples_per_step: int
    """Documents per optimizer step, summed over all ranks and microbatches (the global batch)."""

    microbatch_tokens: int
    """Most tokens in one forward pass of one rank. Bounds activation memory; changes nothing in the result."""

    epochs: float = 1.0
    """Passes over the training data; may be a fraction."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says; null: no such limit."""

    validate_every_steps: int = 0
    """Compute the validation loss every so many steps, and at the end; 0: at the start and the end only."""

    checkpoint_every_steps: int = 0
    """Save a checkpoint every so many steps, and at the end; 0: at the end only."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""

    checkpoint_staging_mib: int = STAGING_BYTES >> 20
    """Host memory (MiB) that each process may take while a checkpoint is being written, to go on with its step when the
    disk is slower than forward and backward; 0: it then waits."""

    timeline_step: int = 0
    """Record this optimizer step (1: the first) on every rank and draw it, as timeline.png and timeline.json in the run
    folder. Take 2 or later: the order of the blocks, and so what to prefetch, is learnt in the first. 0: none."""

    seed: int = 0
    """Seed of new parameters and of dropout. (The order of the data has its own, data.seed.)"""

    def __post_init__(self) -> None:
        for name, least in (
            ("examples_per_step", 1),
            ("microbatch_tokens", 2),
            ("validate_every_steps", 0),
            ("checkpoint_every_steps", 0),
            ("keep_checkpoints", 1),
            ("checkpoint_staging_mib", 0),
            ("timeline_step", 0),
            ("seed", 0),
        ):
            if self.__dict__[name] < least:
                raise ValueError(f"loop.{name} is {self.__dict__[name]}; valid: {least} or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"loop.max_steps is {self.max_steps}; valid: 1 or more, or null for no limit")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"loop.epochs is {self.epochs}; valid: a number above 0")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = max(1, math.ceil(self.epochs * steps_per_epoch))
        return steps if self.max_steps is None else min(steps, self.max_steps)
