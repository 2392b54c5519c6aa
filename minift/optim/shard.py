"""The flat shard: all that an optimizer sees of a model.

FSDP cuts every trainable bucket (all trainable tensors of a unit) into one contiguous piece per rank. A `FlatShard` is
this rank's piece: one 1-D tensor of weights, its gradient, and the list of which elements belong to which parameter.
The optimizer never sees a module, a unit or a rank, and the shard may cut a parameter anywhere. Under data-parallel
replicas (DDP, HSDP) several ranks hold equal shards, and each updates its own, to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minift.ops.halves import read_weights, write_weights_


@dataclass(frozen=True)
class ParamRange:
    """Elements [start, stop) of a shard are those of parameter `name`, flattened, from `param_start` on.

    full_shape: of the whole, unsharded parameter.
    """

    name: str
    start: int
    stop: int
    param_start: int
    full_shape: tuple[int, ...]


@dataclass
class FlatShard:
    """This rank's piece of one trainable bucket.

    name: unique among the shards of a model and the same on every rank (it is the key of the optimizer state).
    master: (n,) fp32 or bf16, the weights that the optimizer updates in place.
    lower: (n,) int16, what `master`, bf16, lacks of fp32 weights (`ops/halves.py`), updated too. None: nothing; bf16
        weights are then rounded stochastically.
    grad: (n,) fp32, the sum of the reduced gradients, which its owner adds into; may be scaled (AdamW's grad_factor).
        None: there is none at the moment, and no memory for it.
    ranges: ordered, not overlapping. Elements in no range are padding: zero in `master`, `lower` and `grad`.
    """

    name: str
    master: Tensor
    grad: Tensor | None
    ranges: list[ParamRange]
    lower: Tensor | None = None

    def __post_init__(self) -> None:
        valid = self.master.dim() == 1 and self.master.dtype in (torch.float32, torch.bfloat16)
        assert valid, f"{self.name}: master must be 1-D fp32 or bf16"
        if self.lower is not None:
            valid = self.lower.shape == self.master.shape and self.lower.dtype == torch.int16
            valid = valid and self.master.dtype == torch.bfloat16
            assert valid, f"{self.name}: lower must be int16, beside a bf16 master"
        valid = self.grad is None or (self.grad.shape == self.master.shape and self.grad.dtype == torch.float32)
        assert valid, f"{self.name}: grad must be fp32 of the shape of master"
        end = 0
        for piece in self.ranges:
            assert end <= piece.start < piece.stop <= self.master.numel(), f"{self.name}: bad range {piece}"
            end = piece.stop

    @property
    def is_rounded(self) -> bool:
        """Whether weights are bf16, and updates rounded to it."""
        return self.master.dtype == torch.bfloat16 and self.lower is None

    def halves(self) -> dict[str, Tensor]:
        """The tensors that hold the weights: "master", and "lower" if there is one."""
        return {"master": self.master} | ({} if self.lower is None else {"lower": self.lower})

    def weights(self) -> Tensor:
        """(n,), as the optimizer sees them: `master`, or fp32 of both halves, which is new memory."""
        return read_weights(self.master, self.lower)

    def set_weights(self, values: Tensor, start: int = 0) -> None:
        """Let the weights from `start` on be `values`, 1-D. Its owner is to be told: `ShardedModel.weights_changed`."""
        here = slice(start, start + len(values))
        write_weights_(self.master[here], None if self.lower is None else self.lower[here], values)

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Let the parameters in `values`, whole, be these. Its owner is to be told, as of `set_weights`."""
        for piece in self.ranges:
            if piece.name in values:
                stop = piece.param_start + piece.stop - piece.start
                self.set_weights(values[piece.name].reshape(-1)[piece.param_start : stop], piece.start)
