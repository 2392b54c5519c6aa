"""What `ops_cuda` measures: one op with its inputs, what has to move, and what others offer.

Shapes are those of Llama-3.1-8B with 8192 tokens. Inputs are random, and each call takes the next of several copies, so
that none are found in the 50 MB of an H100's L2. The cases are in cuda_nf4, cuda_rows and cuda_updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from protocol import check_close
from torch import Tensor

ROTATED_BYTES = 256 << 20
BF16 = torch.bfloat16
ROUNDED = 8 * torch.finfo(BF16).eps
"""Of the largest: four roundings, and sums of terms that cancel."""

Run = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """matrix: (out, in) of what is quantised. few, many: tokens. head_rows: of the LM head. weights: AdamW's."""

    tokens: int = 8192
    hidden: int = 4096
    kv: int = 1024
    intermediate: int = 14336
    head_dim: int = 128
    vocab: int = 128256
    matrix: tuple[int, int] = (4096, 14336)
    few: tuple[int, ...] = (1, 2, 8, 16)
    many: tuple[int, ...] = (512, 2048, 8192)
    head_rows: tuple[int, ...] = (4096, 16384)
    weights: int = 1 << 27
    adapters: int = 16
    adapter_tokens: int = 16


TINY = Sizes(64, 256, 64, 512, 64, 512, (256, 512), (1, 16), (32, 64), (64,), 1 << 12, 3, 5)


@dataclass(frozen=True)
class Case:
    """One op. run: does it once. check: ValueError if it is wrong.

    bytes: that have to move, each once; or flops. others: {name: the same, done by others}. prepare: done before every
    turn, not timed; a turn is one call then. has_peak: of interest is also what it allocates.
    """

    name: str
    run: Run
    check: Run
    bytes: float = 0
    flops: float = 0
    others: dict[str, Run] = field(default_factory=dict)
    prepare: Run | None = None
    has_peak: bool = False


class Maker:
    """Of inputs on a device. compiled: torch.compile where it works, else None."""

    def __init__(self, device: torch.device, sizes: Sizes, compiled: Callable[[Callable], Callable] | None) -> None:
        self.device, self.sizes, self.compiled = device, sizes, compiled

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(scale)

    @staticmethod
    def turns(make: Callable[[], T], num_bytes: float) -> Callable[[], T]:
        """One of several that were made, the next at each call. num_bytes: of one."""
        return itertools.cycle([make() for _ in range(min(16, 1 + int(ROTATED_BYTES // num_bytes)))]).__next__


def as_tuple(tensors: Tensor | list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def check_all_close(what: str, expected: object, actual: object, tolerance: float = ROUNDED) -> None:
    """`check_close` of a tensor, or of each of several."""
    for a, b in zip(as_tuple(expected), as_tuple(actual), strict=True):
        check_close(what, a, b, tolerance)


def check_equal(what: str, expected: Tensor, actual: Tensor) -> None:
    """ValueError unless all bits are the same."""
    if not torch.equal(expected.cpu(), actual.cpu()):
        raise ValueError(f"{what}: results differ")
