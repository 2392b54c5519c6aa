"""AdamW with decoupled weight decay on flat shards (arXiv 1711.05101, algorithm 2).

    g = f g                       f: clipping and 1 / loss scale, in one factor
    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    w = w (1 - lr d) - lr / (1 - b1^t)  *  m / (sqrt(v / (1 - b2^t)) + eps)

The same update as `torch.optim.AdamW`. The division by sqrt(1 - b2^t) is folded into the step size and eps, which saves
a pass over memory and changes the last bits only. Parameters that are treated alike (decay d, factor on lr) are one
range of a shard, updated in one go (`segments.py`). Every operation is element-wise, or within a block of the parameter
(8-bit moments), so the result does not depend on where the shards are cut.

Everything is computed in fp32, in one pass over memory (`minift/ops/adamw.py`, `adamw_8bit.py`). bf16 masters are
rounded stochastically, with random bits that depend on the element and not on the shard (`minift/ops/rounding.py`).

Memory beside master and gradient: 8 bytes per element, with 8-bit moments 2.03 (`moments.py`), on the device or on the
host (`memory.py`). Not here: the gradient's norm and when weights are sent (fsdp), schedules (`schedule.py`), the loss
scale (`loss_scaler.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minift.ops.adamw import AdamWStep, Weights
from minift.ops.rounding import stream_key
from minift.optim.config import OptimConfig
from minift.optim.memory import Memory, moments_memory
from minift.optim.moments import MOMENTS, Moments, Place
from minift.optim.segments import Segment, segments
from minift.optim.shard import FlatShard, ParamRange


class AdamW:
    """Updates the weights of every shard in place.

    `step` updates all shards. `begin_step` and then `update` of each shard, in any order and as soon as its gradient is
    complete, gives the same bits.

    Args:
        shards: with distinct names; the list and its tensors stay the caller's.
        config: all but schedule, warmup_steps, min_lr_ratio and max_grad_norm are used here.

    Attributes:
        num_steps: steps begun so far.
        before_update: called with each shard right before its master and moments are overwritten, so that whoever
            still reads them (a checkpoint in the background) can be waited for.
    """

    def __init__(self, shards: Sequence[FlatShard], config: OptimConfig) -> None:
        names = [shard.name for shard in shards]
        assert len(set(names)) == len(names) and "step" not in names, f"bad shard names {names}"
        self.shards = list(shards)
        self.config = config
        self.num_steps = 0
        self.before_update: Callable[[FlatShard], None] | None = None
        self._lr = 0.0  # of the step begun last
        self._due: set[str] = set()  # names of the shards it has not updated yet
        self._memory: dict[torch.device, Memory] = {}  # with the device's buffers, if moments are paged
        self._moments: dict[str, Moments] = {}
        self._segments: dict[str, list[Segment]] = {}
        for shard in shards:
            device = shard.master.device
            if device not in self._memory:
                self._memory[device] = moments_memory(device, config.paged)
            moments = MOMENTS[config.state](shard, self._memory[device].zeros)
            self._moments[shard.name] = moments
            self._segments[shard.name] = segments(shard, config, moments.may_merge)

    def step(self, lr_scale: float, grad_factor: float | Tensor = 1.0) -> None:
        """One update of all shards with the learning rate `config.lr * lr_scale` (times the parameter's ratio).

        grad_factor: multiplies every gradient within the update; `shard.grad` is only read. A number, or a 0-dim fp32
            tensor, for which the host waits only if shards are elsewhere. If that is infinite or NaN nothing is
            written; the host, when it knows, says so by `take_back_step`.
        """
        self.begin_step(lr_scale)
        factors = {device: _as_tensor(grad_factor, device) for device in self._memory}  # once, not for every shard
        for shard in self.shards:
            self.update(shard, factors[shard.master.device])

    def begin_step(self, lr_scale: float) -> None:
        """Count a step, whose `update` of each shard is to follow."""
        self.num_steps += 1
        self._lr = self.config.lr * lr_scale
        self._due = {shard.name for shard in self.shards}

    def take_back_step(self) -> None:
        """The step begun last wrote nothing, as its grad_factor was not finite: it does not count."""
        assert not self._due, f"a step is taken back that has not updated {sorted(self._due)}"
        self.num_steps -= 1

    @torch.no_grad()
    def update(self, shard: FlatShard, grad_factor: Tensor | None = None) -> None:
        """The part of `step` that updates this one of `shards`. grad_factor: 0-dim fp32 on its device; None: 1."""
        assert shard.name in self._due, f"{shard.name}: a second update in one step, or one before begin_step()"
        assert shard.grad is not None, f"{shard.name}: an update before a backward"
        self._due.remove(shard.name)
        if self.before_update is not None:
            self.before_update(shard)
        moments, memory = self._moments[shard.name], self._memory[shard.master.device]
        steps = {segment: self._constants(segment) for segment in self._segments[shard.name]}
        pieces = [(segment, here) for segment in steps for here in segment.pieces(memory.piece_elements)]

        def update_piece(number: int, states: tuple[Tensor, ...]) -> None:
            segment, here = pieces[number]
            first = segment.param_start + here.start - segment.start
            lower = None if shard.lower is None else shard.lower[here]
            weights = Weights(shard.master[here], shard.grad[here], first, lower)
            moments.update(weights, states, grad_factor, steps[segment])

        memory.lend([moments.views(segment, here) for segment, here in pieces], update_piece)

    def _constants(self, segment: Segment) -> AdamWStep:
        beta1, beta2 = self.config.betas
        lr = self._lr * segment.lr_ratio
        root = math.sqrt(1.0 - beta2**self.num_steps)
        return AdamWStep(
            beta1,
            beta2,
            eps=self.config.eps * root,
            step_size=lr * root / (1.0 - beta1**self.num_steps),
            keep=1.0 - lr * segment.decay,
            key=stream_key(self.config.rounding_seed, self.num_steps, segment.name),
        )

    def state_bytes(self) -> int:
        """Of all moments, wherever they lie."""
        return sum(tensor.nbytes for moments in self._moments.values() for tensor in moments.tensors.values())

    def places(self, shard: FlatShard, piece: ParamRange) -> dict[str, Place]:
        """Where the state of `piece`, one of the ranges of `shard`, lies in the tensors of `state_dict`."""
        return self._moments[shard.name].places(piece)

    def state_dict(self) -> dict[str, Any]:
        """{"step": updates done, shard name: {what: 1-D tensor}}, not copied; `moments.py` lists what there is."""
        for memory in self._memory.values():
            memory.settle()
        return {
            "step": self.num_steps,
            **{shard.name: dict(self._moments[shard.name].tensors) for shard in self.shards},
        }

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


def _as_tensor(factor: float | Tensor, device: torch.device) -> Tensor | None:
    """What an update multiplies gradients with; None: nothing."""
    if isinstance(factor, Tensor):
        return factor.to(device)
    return None if factor == 1.0 else torch.full((), factor, device=device)
