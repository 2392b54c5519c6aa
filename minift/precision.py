"""Which number formats a run uses: a frozen policy, passed down explicitly. There is no autocast anywhere in minift.

| field  | what is held or computed in it                                                          | default  |
|--------|-----------------------------------------------------------------------------------------|----------|
| master | the sharded trainable weights and both Adam moments, where updates are accumulated       | float32  |
| wire   | what all-gather carries, and so the weights, activations and GEMM inputs of the forward  | bfloat16 |
| reduce | what reduce-scatter adds up, and so the sharded gradient                                 | float32  |

Statistics (RMSNorm, softmax, log-sum-exp, loss sums) are fp32 in the ops themselves, whatever the policy says. Frozen
weights have no master; they are stored in `wire` or as quantised bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_VALID = {
    "master": ("float32",),  # in bf16 an update below 2^-9 of the weight is rounded away: fine-tuning stops
    "wire": ("float32", "bfloat16"),
    "reduce": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Precision:
    """Names of the number formats, checked (ValueError); the `*_dtype` properties give torch's.

    master: of the sharded trainable weights and of both Adam moments; float32.
    wire: of what all-gather carries, so of weights, activations and GEMM inputs; float32 or bfloat16.
    reduce: in which reduce-scatter adds gradients up; float32 or bfloat16.
    """

    master: str = "float32"
    wire: str = "bfloat16"
    reduce: str = "float32"

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, valid = self.__dict__[entry.name], _VALID[entry.name]
            if value not in valid:
                raise ValueError(f"precision.{entry.name} is {value!r}; valid: {', '.join(valid)}")

    @property
    def master_dtype(self) -> torch.dtype:
        return _DTYPES[self.master]

    @property
    def wire_dtype(self) -> torch.dtype:
        return _DTYPES[self.wire]

    @property
    def reduce_dtype(self) -> torch.dtype:
        return _DTYPES[self.reduce]
