"""Counters in shared memory by which processes on one host tell each other how far they are.

`set_flag` publishes everything that its process wrote before; `wait_flags` sees it. These are the two operations of
this package that have no PyTorch reference: memory ordering between processes cannot be expressed there. Who needs them
asks `AVAILABLE` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minift.ops.extension import MISSING_REASON

AVAILABLE = MISSING_REASON is None


def set_flag(flags_N: Tensor, index: int, value: int) -> None:
    """flags_N[index] = value, after (in memory order) everything that this process wrote before. int64, in shared
    memory.
    """
    torch.ops.minift.set_flag.default(flags_N, index, value)


def wait_flags(flags_N: Tensor, value: int, timeout_ms: int) -> bool:
    """Wait until all of `flags_N` are at least `value`; False if that takes longer than `timeout_ms`. Releases the
    GIL.
    """
    return torch.ops.minift.wait_flags.default(flags_N, value, timeout_ms)
