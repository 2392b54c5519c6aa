"""Ranges of a flat shard that are updated in one go: neighbours with equal hyper-parameters, merged.

What a parameter's name decides (weight decay, factor on lr) is turned into segments once, at construction; parameters
treated alike are one segment, however many they are. Padding between them is merged in: zero with gradient zero stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from minift.optim.config import OptimConfig
from minift.optim.shard import ParamRange


class Ranges(Protocol):
    """What is read of a `FlatShard`, or of one on paper."""

    @property
    def ranges(self) -> Sequence[ParamRange]: ...

    @property
    def is_rounded(self) -> bool: ...


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a shard that share their hyper-parameters.

    The first is element `param_start` of parameter `name`; in a bf16 shard all of them are of this parameter.
    """

    start: int
    stop: int
    lr_ratio: float
    decay: float
    name: str
    param_start: int

    def pieces(self, max_elements: int) -> Iterator[slice]:
        """The segment cut up, `max_elements` at a time."""
        for start in range(self.start, self.stop, max_elements):
            yield slice(start, min(start + max_elements, self.stop))


def segments(
    shard: Ranges, config: OptimConfig, may_merge: Callable[[ParamRange, ParamRange], bool]
) -> list[Segment]:
    """The segments of `shard`. `may_merge`: whether the state of two neighbours lies one after the other.

    Not merged in a bf16 shard, because random bits go by parameter.
    """
    found: list[Segment] = []
    last_piece: ParamRange | None = None
    for piece in shard.ranges:
        lr_ratio, decay = config.lr_ratio(piece.name), config.decay(piece.name)
        is_next = not shard.is_rounded and last_piece is not None and may_merge(last_piece, piece)
        if is_next and (found[-1].lr_ratio, found[-1].decay) == (lr_ratio, decay):
            found[-1] = replace(found[-1], stop=piece.stop)
        else:
            found.append(Segment(piece.start, piece.stop, lr_ratio, decay, piece.name, piece.param_start))
        last_piece = piece
    return found
