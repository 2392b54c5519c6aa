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


@pytest.mark.parametrize(
    ("master", "lower"),
    [(torch.float32, torch.zeros(4, dtype=torch.int16)), (torch.bfloat16, torch.zeros(4, dtype=torch.int32)),
     (torch.bfloat16, torch.zeros(3, dtype=torch.int16))],
)  # fmt: skip
def test_only_a_bf16_master_has_a_lower_half_and_that_is_int16(master, lower):
    with pytest.raises(AssertionError, match="s: lower must be int16, beside a bf16 master"):
        FlatShard("s", torch.zeros(4, dtype=master), None, [], lower)


@pytest.mark.parametrize("in_halves", [True, False])
def test_weights_are_written_where_they_are(in_halves):
    """Elements 2 to 5 of `w`, of 2 of 3 columns, from element 1 of the shard on; in fp32."""
    master = torch.zeros(6, dtype=torch.bfloat16 if in_halves else torch.float32)
    lower = torch.zeros(6, dtype=torch.int16) if in_halves else None
    shard = FlatShard("s", master, None, [ParamRange("w", 1, 5, 2, (2, 3))], lower)
    values = torch.arange(6.0).view(2, 3) + 2.0**-20
    shard.write({"w": values, "another": values})
    assert shard.weights().tolist() == [0.0, *values.view(-1)[2:6].tolist(), 0.0]
    shard.set_weights(torch.tensor([7.125]), start=5)
    assert shard.weights()[5] == 7.125 and shard.weights()[4] == values[1, 2]
    assert list(shard.halves()) == ["master", "lower"][: 1 + in_halves] and not shard.is_rounded


@pytest.mark.parametrize("bounds", [[(0, 3), (2, 4)], [(2, 4), (0, 2)], [(1, 1)], [(0, 5)]])
def test_ranges_are_ordered_inside_and_do_not_overlap(bounds):
    ranges = [ParamRange("w", start, stop, 0, (9,)) for start, stop in bounds]
    with pytest.raises(AssertionError, match="s: bad range"):
        FlatShard("s", torch.zeros(4), torch.zeros(4), ranges)
