"""What a policy refuses, and what it answers."""

from __future__ import annotations

import pytest
import torch

from minift.dist.process import World
from minift.fsdp import ShardPolicy
from tests.fsdp.trees import Case, sharded


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
        ({"offload_frozen": ("layers.(",)}, "fsdp.offload_frozen has 'layers.(', no regular expression"),
        ({"offload_frozen": ("layers",), "strategy": "zero2"}, "fsdp.offload_frozen is ['layers'] with strategy zero2"),
        ({"offload_frozen": ("layers",), "reshard_after_forward": False}, "reshard_after_forward false and offload"),
        ({"offload_frozen": ("layers",), "offload": True}, "and offload true; valid with zero3"),
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


def test_what_waits_in_host_memory() -> None:
    odd = ShardPolicy(offload_frozen=(r"layers\.\d*[13579]$",))
    assert [i for i in range(12) if odd.is_offloaded(f"layers.{i}", trainable=False)] == [1, 3, 5, 7, 9, 11]
    assert not odd.is_offloaded("layers.1", trainable=True) and not odd.is_offloaded("", trainable=False)
    assert ShardPolicy(offload=True).is_offloaded("", trainable=True)
    assert not ShardPolicy(offload_frozen=("",)).is_offloaded("", trainable=False)  # the root is no block


@pytest.mark.parametrize(
    ("policy", "frozen", "message"),
    [
        (ShardPolicy(offload_frozen=("blocks.1",)), "blocks.0", "block blocks.1, which has no frozen weights"),
        (ShardPolicy(offload_frozen=("1",), keep_gathered=("blocks",)), "up", "which stays gathered from forward to"),
        (ShardPolicy(offload_frozen=("blocks.9",)), "up", "has 'blocks.9', found in no name of the 3 blocks"),
    ],
)
def test_blocks_that_would_gain_nothing_are_refused(policy: ShardPolicy, frozen: str, message: str) -> None:
    world = World(0, 1, 0, torch.device("cpu"), "gloo", None)
    with pytest.raises(ValueError, match=message):
        sharded(Case(1, frozen=frozen, policy=policy), world)
