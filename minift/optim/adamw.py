"""AdamW with decoupled weight decay on flat fp32 shards (arXiv 1711.05101, algorithm 2).

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    w = w (1 - lr d) - lr / (1 - b1^t)  *  m / (sqrt(v / (1 - b2^t)) + eps)

The same update as `torch.optim.AdamW`. The division by sqrt(1 - b2^t) is folded into the step size and eps, which saves
a pass over memory and changes the last bits only. What a parameter's name decides (decay d, factor on lr) is turned
into *segments* of each shard once, at construction; parameters treated alike are one segment, however many they are.
Every operation is element-wise, so the result does not depend on where the shards are cut.

Memory: 8 bytes of moments per element beside master and gradient; one scratch block. Not here: clipping (fsdp), the
cast of the new weights to the wire dtype (fsdp), schedules (`schedule.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard

# The update is six or seven element-wise passes. On a CPU they go over blocks whose five tensors stay in the cache, so
# DRAM is read and written once; on a GPU a block is large enough to hide its launches, and its scratch is 64 MiB.
_BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class _Segment:
    """Elements [start, stop) of a shard that share their hyper-parameters."""

    start: int
    stop: int
    lr_ratio: float
    decay: float


class AdamW:
    """Updates `shard.master` of every shard in place.

    Args:
        shards: with distinct names; the list and its tensors stay the caller's.
        config: lr, betas, eps, weight_decay, no_decay and lr_ratios are used here.
    """

    def __init__(self, shards: Sequence[FlatShard], config: OptimConfig) -> None:
        names = [shard.name for shard in shards]
        assert len(set(names)) == len(names) and "step" not in names, f"bad shard names {names}"
        self.shards = list(shards)
        self.config = config
        self.num_steps = 0
        self._segments = {shard.name: _segments(shard, config) for shard in shards}
        self._exp_avg = {shard.name: torch.zeros_like(shard.master) for shard in shards}
        self._exp_avg_sq = {shard.name: torch.zeros_like(shard.master) for shard in shards}

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One update with the learning rate `config.lr * lr_scale` (times the parameter's ratio)."""
        self.num_steps += 1
        for shard in self.shards:
            for segment in self._segments[shard.name]:
                self._update(shard, segment, self.config.lr * lr_scale * segment.lr_ratio)

    def _update(self, shard: FlatShard, segment: _Segment, lr: float) -> None:
        beta1, beta2 = self.config.betas
        root = math.sqrt(1.0 - beta2**self.num_steps)
        step_size = lr * root / (1.0 - beta1**self.num_steps)
        block = _BLOCK_ELEMENTS[shard.master.device.type]
        scratch = torch.empty(min(block, segment.stop - segment.start), dtype=torch.float32, device=shard.master.device)
        for start in range(segment.start, segment.stop, block):
            here = slice(start, min(start + block, segment.stop))
            grad, master = shard.grad[here], shard.master[here]
            exp_avg, exp_avg_sq = self._exp_avg[shard.name][here], self._exp_avg_sq[shard.name][here]
            exp_avg.lerp_(grad, 1.0 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            denominator = torch.sqrt(exp_avg_sq, out=scratch[: grad.numel()]).add_(self.config.eps * root)
            if segment.decay:
                master.mul_(1.0 - lr * segment.decay)
            master.addcdiv_(exp_avg, denominator, value=-step_size)

    def zero_grad(self) -> None:
        """Zero the gradients in place: they belong to the engine, which adds the next microbatch's into them."""
        for shard in self.shards:
            shard.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """{"step": updates done, shard name: {"exp_avg": (n,) fp32, "exp_avg_sq": (n,) fp32}}, not copied."""
        moments = {
            shard.name: {"exp_avg": self._exp_avg[shard.name], "exp_avg_sq": self._exp_avg_sq[shard.name]}
            for shard in self.shards
        }
        return {"step": self.num_steps, **moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a `state_dict` in, bit for bit. Raises ValueError, changing nothing, unless it fits these shards."""
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"optimizer state does not fit: missing {sorted(expected.keys() - state.keys())}, "
                f"unexpected {sorted(state.keys() - expected.keys())}"
            )
        step = state["step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"optimizer state has step {step!r}; valid: an integer >= 0")
        for name in (shard.name for shard in self.shards):
            if state[name].keys() != expected[name].keys():
                raise ValueError(
                    f"optimizer state of {name} has {sorted(state[name])}; valid: exactly {sorted(expected[name])}"
                )
            for key, ours in expected[name].items():
                theirs = state[name][key]
                if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                    raise ValueError(
                        f"optimizer state {key} of {name} is {theirs.dtype} of shape {tuple(theirs.shape)}; "
                        f"valid: {ours.dtype} of shape {tuple(ours.shape)}"
                    )
        for name in (shard.name for shard in self.shards):
            for key, ours in expected[name].items():
                ours.copy_(state[name][key])
        self.num_steps = step


def _segments(shard: FlatShard, config: OptimConfig) -> list[_Segment]:
    """Neighbouring ranges with equal hyper-parameters, merged over padding between them (0 with gradient 0 stays 0)."""
    segments: list[_Segment] = []
    for piece in shard.ranges:
        lr_ratio, decay = config.lr_ratio(piece.name), config.decay(piece.name)
        if segments and (segments[-1].lr_ratio, segments[-1].decay) == (lr_ratio, decay):
            segments[-1] = _Segment(segments[-1].start, piece.stop, lr_ratio, decay)
        else:
            segments.append(_Segment(piece.start, piece.stop, lr_ratio, decay))
    return segments
