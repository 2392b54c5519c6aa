"""What a policy refuses, and what it answers."""

from __future__ import annotations

import pytest

from minift.fsdp import ShardPolicy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "zero4"}, "fsdp.strategy is 'zero4'; valid: zero3, zero2, zero1, ddp"),
        ({"replicas": 0}, "fsdp.replicas is 0"),
        ({"prefetch_units": -1}, "fsdp.prefetch_units is -1"),
        ({"strategy": "ddp", "replicas": 2}, "with strategy ddp"),
        ({"strategy": "zero1", "step_in_backward": True}, "valid with zero2 and zero3"),
        ({"keep_gathered": ("layers.(",)}, "no regular expression"),
        ({"offload": True, "strategy": "zero1"}, "valid with zero2 and zero3 without replicas"),
        ({"offload": True, "replicas": 2}, "valid with zero2 and zero3 without replicas"),
    ],
)
def test_nonsense_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        ShardPolicy(**fields)
    assert message in str(caught.value)


def test_groups() -> None:
    assert ShardPolicy().shard_size(8) == 8
    assert ShardPolicy(replicas=2).shard_size(8) == 4
    assert ShardPolicy(strategy="ddp").shard_size(8) == 1
    with pytest.raises(ValueError, match="fsdp.replicas is 3 on 8 processes"):
        ShardPolicy(replicas=3).shard_size(8)


def test_which_blocks_stay() -> None:
    some = ShardPolicy(keep_gathered=(r"layers\.[01]$",))
    assert [some.keeps_until_backward(f"layers.{i}") for i in (0, 1, 2, 10)] == [True, True, False, False]
    assert ShardPolicy(reshard_after_forward=False).keeps_until_backward("anything")
