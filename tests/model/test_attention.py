"""Which attention a pack is for, and that all agree. cuDNN is pretended to be there (tests/ops/pretended_cudnn.py), in
fp64, so it differs from minift's own in fp64 by one rounding to bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minift.model import attention as module
from minift.model.attention import Packing, packed_attention
from minift.ops import cudnn_attention
from minift.ops.attention import causal_attention
from tests.ops.pretended_cudnn import pretended_cudnn


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """An entry for each attention that cuDNN was given."""
    made: list[int] = []

    def counted(*arguments):
        made.append(1)
        return cudnn_attention.cudnn_attention(*arguments)

    with pretended_cudnn() as patch:
        patch.setattr(cudnn_attention, "is_usable", lambda device: True)
        patch.setattr(cudnn_attention, "LEAST_LONGEST", 4)
        patch.setattr(cudnn_attention, "BATCH_UNIT", 5)
        patch.setattr(module, "cudnn_attention", counted)
        yield made


@pytest.mark.parametrize(
    ("lengths", "num_shared", "window", "is_cudnn"),
    [
        ([5, 3, 9], 0, None, True),
        ([5, 5], 0, None, True),
        ([7], 0, None, True),
        ([1, 1, 1, 1, 9], 0, 100, True),
        ([5, 3, 9], 0, 9, True),  # a window that cuts nothing
        ([5, 3, 9], 0, 8, False),
        ([5, 3, 9], 2, None, False),
        ([3, 3, 2], 0, None, False),  # short ones
    ],
)
def test_every_kind_of_pack_gets_the_same_attention(calls, lengths, num_shared, window, is_cudnn):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths) + num_shared
    bounds = torch.tensor([0, *lengths]).cumsum(0).int() + num_shared
    q, k, v = (torch.randn(total, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    packing = Packing(bounds, max(lengths), torch.zeros(total, 8), torch.zeros(total, 8), num_shared=num_shared)

    out = packed_attention(q, k, v, packing, window)

    assert bool(calls) == is_cudnn
    if not is_cudnn:
        assert torch.equal(out, causal_attention(q, k, v, bounds, bounds, window))
        return
    expected = causal_attention(q.double(), k.double(), v.double(), bounds, bounds, window)
    assert ((out.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()
