"""The layout of one flat tensor. Oracle: brute force over every element."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.fsdp.flat import FlatLayout


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=6),
    world_size=st.integers(1, 5),
    itemsize=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([1, 48, 256]),
)
def test_layout_covers_every_element_exactly_once(
    shapes: list[list[int]], world_size: int, itemsize: int, block: int
) -> None:
    """Paint every element of every parameter through the ranks' ranges, and the rest through the gaps."""
    named = {f"p{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    layout = FlatLayout.plan(named, world_size, itemsize, block)
    painted = {name: [0] * shape.numel() for name, shape in named.items()}
    full = torch.zeros(layout.full_numel, dtype=torch.int32)
    for rank in range(world_size):
        chunk = layout.chunk(full, rank)
        for r in layout.local_ranges(rank):
            assert 0 <= r.start < r.stop <= layout.shard_numel
            assert r.start % block == r.param_start % block == 0  # no block of a parameter is in two shards
            chunk[r.start : r.stop] += 1
            for i in range(r.stop - r.start):
                painted[r.name][r.param_start + i] += 1
    assert all(count == 1 for counts in painted.values() for count in counts)
    for gap in layout.gaps():
        full[gap] += 1
    assert (full == 1).all()
    assert all(span.start * itemsize % 64 == 0 for span in layout.spans)
    assert layout.full_numel * itemsize % (64 * world_size) == layout.shard_numel % block == 0


def test_views_are_the_parameters() -> None:
    layout = FlatLayout.plan({"a": torch.Size([3, 5]), "b": torch.Size([7])}, 2, 4)
    full = torch.arange(layout.full_numel)
    a, b = layout.views(full)
    assert a.shape == (3, 5) and b.shape == (7,)
    assert a[2, 4] == 14 and b[0] == layout.spans[1].start == 16
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
