"""The numbers of the NF4 format: csrc/nf4.h is their definition, repeated here for machines without the extension.

Paper: Dettmers et al. 2023, arXiv 2305.14314, appendix E (the codebook). Scales are quantised by the map of 8-bit
optimizer states (`blockwise.py`).
"""

from __future__ import annotations

import torch

from minift.ops.blockwise import dynamic_map_values

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""(16,) fp32: quantiles of the normal distribution, rescaled to [-1, 1], with an exact zero."""

THRESHOLDS = (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
"""(15,) fp32: code i ends at THRESHOLDS[i], inclusive."""

SMALLEST_DIVISOR = 1e-38  # blocks of smaller numbers are divided by this, as the reciprocal of less would overflow

DYNAMIC_MAP = dynamic_map_values(signed=True)
"""(256,) fp32, ascending: what a byte of double-quantised scales stands for; zero is number 127."""
