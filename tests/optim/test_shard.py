from __future__ import annotations

import pytest
import torch

from minift.optim.shard import FlatShard, ParamRange


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_may_be_fp32_or_bf16_and_gradients_are_fp32(dtype):
    FlatShard("s", torch.zeros(4, dtype=dtype), torch.zeros(4), [ParamRange("w", 0, 4, 0, (4,))])
    with pytest.raises(AssertionError, match="s: grad must be fp32"):
        FlatShard("s", torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=torch.bfloat16), [])
    with pytest.raises(AssertionError, match="s: grad must be fp32 of the shape"):
        FlatShard("s", torch.zeros(4, dtype=dtype), torch.zeros(3), [])


@pytest.mark.parametrize("master", [torch.zeros(4, dtype=torch.float16), torch.zeros(2, 2)])
def test_other_masters_are_refused(master):
    with pytest.raises(AssertionError, match="s: master must be 1-D fp32 or bf16"):
        FlatShard("s", master, torch.zeros(4), [])


@pytest.mark.parametrize("bounds", [[(0, 3), (2, 4)], [(2, 4), (0, 2)], [(1, 1)], [(0, 5)]])
def test_ranges_are_ordered_inside_and_do_not_overlap(bounds):
    ranges = [ParamRange("w", start, stop, 0, (9,)) for start, stop in bounds]
    with pytest.raises(AssertionError, match="s: bad range"):
        FlatShard("s", torch.zeros(4), torch.zeros(4), ranges)
