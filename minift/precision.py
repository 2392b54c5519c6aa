"""Which number formats a run uses: a frozen policy, passed down explicitly. There is no autocast anywhere in minift.

| field  | what is held or computed in it                                                          | default  |
|--------|-----------------------------------------------------------------------------------------|----------|
| master | the sharded trainable weights, where updates are accumulated                             | float32  |
| wire   | what all-gather carries, and so the weights, activations and GEMM inputs of the forward  | bfloat16 |
| reduce | what reduce-scatter adds up, at least: gloo's transports always add in fp32             | float32  |

What each choice is for (any wire goes with any master):

| wire     | reduce   | for                                                                                         |
|----------|----------|---------------------------------------------------------------------------------------------|
| bfloat16 | float32  | every processor with bf16 matrix units; the range of fp32, so nothing over- or underflows    |
| bfloat16 | bfloat16 | a slow network: half the bytes; every addition of two ranks' gradients is off by up to 2^-9  |
| float32  | float32  | comparing numbers, and processors without 16-bit matrix units                                |
| float32  | bfloat16 | exact compute over a slow network                                                            |
| float16  | float32  | GPUs before bf16 (Volta, Turing). 8 times finer than bf16, but 65504 is the largest number   |
|          |          | and 2^-24 the smallest, so the loss is scaled (`optim/loss_scaler.py`). For GPUs: a CPU      |
|          |          | multiplies fp16 matrices correctly, but ten times slower than bf16 ones and more             |
| float16  | float16  | the same over a slow network. The gradients are in fp16 already, and a sum that overflows is |
|          |          | infinite, which the loss scaler answers as it does an overflow in backward. Only with wire   |
|          |          | float16, because without a loss scaler nothing would answer                                  |
| float16  | bfloat16 | the same where sums over very many ranks overflow too often                                  |

| master   | stochastic_rounding | for                                                                                |
|----------|---------------------|------------------------------------------------------------------------------------|
| float32  | false               | everything that fits. With a bf16 wire in two halves, of which one is what is sent |
|          |                     | (`ops/halves.py`): no casts, and in one process no gather buffers                  |
| bfloat16 | true                | full fine-tuning in 2 bytes less per weight. Right on average, but noisier:        |
|          |                     | `ops/rounding.py`                                                                  |

A bf16 master rounded to nearest is refused: updates below 2^-9 of a weight would be rounded away, and fine-tuning
makes hardly any others. Whatever the policy says, both Adam moments, the sharded gradient that microbatches are added
up in, statistics (RMSNorm, softmax, log-sum-exp) and the loss are fp32: there is no `loss` field, because a loss in
16 bits has no use. Frozen weights have no master; they are stored in `wire` or as quantised bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VALID = {
    "master": ("float32", "bfloat16"),
    "wire": ("float32", "bfloat16", "float16"),
    "reduce": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Precision:
    """Names of the number formats, checked (ValueError); the `*_dtype` properties give torch's. The loss is float32.

    master: of the sharded trainable weights; float32, or bfloat16 with stochastic_rounding. Adam moments are float32.
    wire: of what all-gather carries, so of weights, activations and GEMM inputs; float32, bfloat16 or float16.
    reduce: in which reduce-scatter adds gradients up; float32, bfloat16, or float16 if that is the wire.
    stochastic_rounding: round updated bfloat16 masters up or down at random, so that the mean of many small updates is
        kept; needed with master bfloat16 and meaningless without. The seed is optim.rounding_seed.
    """

    master: str = "float32"
    wire: str = "bfloat16"
    reduce: str = "float32"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        for name, valid in _VALID.items():
            value = self.__dict__[name]
            if value not in valid:
                raise ValueError(f"precision.{name} is {value!r}; valid: {', '.join(valid)}")
        if self.master == "bfloat16" and not self.stochastic_rounding:
            raise ValueError(
                "precision.master is 'bfloat16' without stochastic rounding: updates below 2^-9 of a weight would be "
                "rounded away, and fine-tuning stops; valid: float32, or bfloat16 with precision.stochastic_rounding"
            )
        if self.stochastic_rounding and self.master != "bfloat16":
            raise ValueError(
                f"precision.stochastic_rounding is true, but precision.master is {self.master!r}, which is never "
                "rounded; valid: master bfloat16, or stochastic_rounding false"
            )
        if self.reduce == "float16" and self.wire != "float16":
            raise ValueError(
                f"precision.reduce is 'float16', but precision.wire is {self.wire!r}: a sum above 65504 would be "
                "infinite and no loss scaler there to answer it; valid: float32, bfloat16, or float16 with wire float16"
            )

    @property
    def master_dtype(self) -> torch.dtype:
        return _DTYPES[self.master]

    @property
    def wire_dtype(self) -> torch.dtype:
        return _DTYPES[self.wire]

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of what is stored of trainable weights and gathered: of masters, or of their upper halves."""
        return self.wire_dtype if self.has_halves else self.master_dtype

    @property
    def has_halves(self) -> bool:
        """Whether fp32 masters are stored in two halves, of which the upper one is what is sent (`ops/halves.py`)."""
        return self.master == "float32" and self.wire == "bfloat16"

    @property
    def reduce_dtype(self) -> torch.dtype:
        return _DTYPES[self.reduce]

    @property
    def needs_loss_scaling(self) -> bool:
        """Whether gradients are computed in a format so narrow that the loss must be scaled (`optim.loss_scaler`)."""
        return self.wire == "float16"
