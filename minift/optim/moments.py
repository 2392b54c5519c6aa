"""First and second moments of one flat shard: which tensors hold them, where a parameter's are, and their update.

| optim.state | bytes per element | tensors                                                                          |
|-------------|-------------------|----------------------------------------------------------------------------------|
| fp32        | 8                 | exp_avg, exp_avg_sq: fp32, an entry for every element of the shard               |
| 8bit        | 2.03              | exp_avg_codes, exp_avg_sq_codes: uint8, an entry for every element of the shard; |
|             |                   | exp_avg_absmax, exp_avg_sq_absmax: fp32, an entry for every 256 elements         |
|             | 8 more            | exp_avg, exp_avg_sq: fp32, of parameters below 4096 elements only                |

Blocks of 256 and what is small are properties of the whole parameter, as in bitsandbytes, not of what a rank holds of
it: with equal gradients the states are the same bits on any number of ranks. A shard therefore has to be cut where
blocks end (`fsdp.flat` cuts and pads trainable buckets so).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minift.ops.adamw import AdamWStep, Weights, adamw_
from minift.ops.adamw_8bit import QuantizedMoments, adamw_8bit_
from minift.ops.blockwise import BLOCK, ZERO_CODES, dynamic_map
from minift.optim.segments import Segment
from minift.optim.shard import FlatShard, ParamRange

MIN_8BIT_ELEMENTS = 4096
"""Smaller parameters keep fp32 moments: norms and biases, which are sensitive and few. bitsandbytes' min_8bit_size."""

Allocate = Callable[[int, torch.dtype], Tensor]
"""(numel, dtype) -> zeros, 1-D."""


@dataclass(frozen=True)
class Place:
    """Entries [start, stop) of a state tensor belong to a range of a parameter, one to every `elements` elements."""

    start: int
    stop: int
    elements: int = 1


class Moments(Protocol):
    """The moments of one shard."""

    tensors: dict[str, Tensor]
    """By what they are, 1-D."""

    def places(self, piece: ParamRange) -> dict[str, Place]:
        """Where the state of `piece`, one of the shard's ranges, lies in `tensors`."""
        ...

    @staticmethod
    def may_merge(first: ParamRange, second: ParamRange) -> bool:
        """Whether neighbours may be updated as one range."""
        ...

    def views(self, segment: Segment, here: slice) -> tuple[Tensor, ...]:
        """The state of elements `here` of the shard, a part of `segment`."""
        ...

    def update(self, weights: Weights, states: tuple[Tensor, ...], grad_factor: Tensor | None, step: AdamWStep) -> None:
        """One step, in place, of weights whose `views` are `states` (or a copy of them elsewhere); see `ops.adamw`."""
        ...


class Fp32Moments:
    """Two fp32 numbers for every element."""

    def __init__(self, shard: FlatShard, allocate: Allocate) -> None:
        numel = len(shard.master)
        self.tensors = {what: allocate(numel, torch.float32) for what in ("exp_avg", "exp_avg_sq")}

    def places(self, piece: ParamRange) -> dict[str, Place]:
        return {what: Place(piece.start, piece.stop) for what in self.tensors}

    @staticmethod
    def may_merge(first: ParamRange, second: ParamRange) -> bool:
        return True

    def views(self, segment: Segment, here: slice) -> tuple[Tensor, ...]:
        return tuple(tensor[here] for tensor in self.tensors.values())

    def update(self, weights: Weights, states: tuple[Tensor, ...], grad_factor: Tensor | None, step: AdamWStep) -> None:
        adamw_(weights, *states, grad_factor, step)


class BlockwiseMoments:
    """8-bit codes and a scale for every 256 elements; see above."""

    def __init__(self, shard: FlatShard, allocate: Allocate) -> None:
        numel, num_small = len(shard.master), 0
        self._small: dict[str, int] = {}  # parameter -> first entry of its fp32 moments
        for piece in shard.ranges:
            if is_small(piece):
                self._small[piece.name] = num_small
                num_small += piece.stop - piece.start
            else:
                ends_block = piece.param_start + piece.stop - piece.start
                is_cut_at_blocks = ends_block % BLOCK == 0 or ends_block == math.prod(piece.full_shape)
                assert piece.start % BLOCK == piece.param_start % BLOCK == 0 and is_cut_at_blocks, (
                    f"{shard.name}: {piece} is not cut where blocks of {BLOCK} end"
                )
        self._maps = [dynamic_map(signed).to(shard.master.device) for signed in (True, False)]
        blocks = -(-numel // BLOCK)
        self.tensors = {
            "exp_avg_codes": allocate(numel, torch.uint8),
            "exp_avg_absmax": allocate(blocks, torch.float32),
            "exp_avg_sq_codes": allocate(numel, torch.uint8),
            "exp_avg_sq_absmax": allocate(blocks, torch.float32),
            "exp_avg": allocate(num_small, torch.float32),
            "exp_avg_sq": allocate(num_small, torch.float32),
        }
        # Padding is not in a checkpoint, but in a parameter's last block: with any absmax it has to mean zero.
        self.tensors["exp_avg_codes"].fill_(ZERO_CODES[True])
        self.tensors["exp_avg_sq_codes"].fill_(ZERO_CODES[False])

    def places(self, piece: ParamRange) -> dict[str, Place]:
        if piece.name in self._small:
            start = self._small[piece.name]
            return {what: Place(start, start + piece.stop - piece.start) for what in ("exp_avg", "exp_avg_sq")}
        codes = Place(piece.start, piece.stop)
        absmax = Place(piece.start // BLOCK, -(-piece.stop // BLOCK), BLOCK)
        return {
            f"{moment}_{what}": place
            for moment in ("exp_avg", "exp_avg_sq")
            for what, place in (("codes", codes), ("absmax", absmax))
        }

    @staticmethod
    def may_merge(first: ParamRange, second: ParamRange) -> bool:
        return not (is_small(first) or is_small(second))

    def views(self, segment: Segment, here: slice) -> tuple[Tensor, ...]:
        if segment.name in self._small:
            start = self._small[segment.name] + here.start - segment.start
            entries = slice(start, start + here.stop - here.start)
            return self.tensors["exp_avg"][entries], self.tensors["exp_avg_sq"][entries]
        blocks = slice(here.start // BLOCK, -(-here.stop // BLOCK))
        return (
            self.tensors["exp_avg_codes"][here],
            self.tensors["exp_avg_absmax"][blocks],
            self.tensors["exp_avg_sq_codes"][here],
            self.tensors["exp_avg_sq_absmax"][blocks],
        )

    def update(self, weights: Weights, states: tuple[Tensor, ...], grad_factor: Tensor | None, step: AdamWStep) -> None:
        if len(states) == 2:  # a small parameter
            adamw_(weights, *states, grad_factor, step)
        else:
            adamw_8bit_(weights, QuantizedMoments(*states), *self._maps, grad_factor, step)


def is_small(piece: ParamRange) -> bool:
    """Whether its moments stay fp32."""
    return math.prod(piece.full_shape) < MIN_8BIT_ELEMENTS


MOMENTS: dict[str, type[Fp32Moments] | type[BlockwiseMoments]] = {"fp32": Fp32Moments, "8bit": BlockwiseMoments}
"""By `OptimConfig.state`."""
