"""What collectives cost on paper. Oracles: arithmetic by hand, and limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.planner.network import NCCL, Members, Network, Protocol

EIGHT_WAY = Network(370e9, 50e9, ranks_per_node=8, protocols=(Protocol(),))


def test_bandwidth_is_that_of_the_narrowest_link() -> None:
    assert EIGHT_WAY.bytes_per_s(EIGHT_WAY.shard_axis(8)) == 370e9  # one node
    assert EIGHT_WAY.bytes_per_s(EIGHT_WAY.shard_axis(16)) == 370e9  # eight interfaces: 400
    assert EIGHT_WAY.bytes_per_s(EIGHT_WAY.replica_axis(64, 8)) == 50e9  # one rank of each node
    assert EIGHT_WAY.bytes_per_s(EIGHT_WAY.replica_axis(64, 2)) == 4 * 50e9  # four of each node


def test_time_of_a_gather_and_a_sum() -> None:
    assert EIGHT_WAY.shard_seconds(8e9, EIGHT_WAY.shard_axis(8)) == pytest.approx(8e9 * 7 / 8 / 370e9)
    assert EIGHT_WAY.sum_seconds(8e9, EIGHT_WAY.replica_axis(64, 8)) == pytest.approx(2 * 8e9 * 7 / 8 / 50e9)


def test_latency_counts_hops() -> None:
    network = Network(1e30, 1e30, 8, (Protocol(1.0, 10.0, 1000.0),))
    assert network.shard_seconds(1.0, network.shard_axis(32)) == pytest.approx(1 + 28 * 10 + 3 * 1000)
    assert network.sum_seconds(1.0, network.shard_axis(32)) == pytest.approx(1 + 14 * 10 + 2 * 2 * 1000)  # a tree
    assert network.sum_seconds(1.0, network.replica_axis(16, 8)) == pytest.approx(1 + 2 * 1000)


sizes = st.integers(0, 12).map(lambda exponent: 2**exponent)


@given(sizes, sizes, st.floats(0, 1e12), st.integers(1, 16))
def test_nothing_is_sent_alone_and_more_takes_longer(size: int, shard: int, num_bytes: float, per_node: int) -> None:
    network = Network(370e9, 50e9, per_node)
    shard = min(shard, size)
    for members, seconds in (
        (network.shard_axis(shard), network.shard_seconds),
        (network.replica_axis(size, shard), network.sum_seconds),
    ):
        assert 1 <= members.per_node <= min(members.size, per_node) and members.nodes <= members.size
        once, twice = seconds(num_bytes, members), seconds(2 * num_bytes, members)
        assert (once == 0.0) == (members.size == 1) and once <= twice <= 2 * once
        assert seconds(num_bytes, Members(members.size * 2, members.per_node)) >= once


def test_small_messages_go_by_the_protocol_of_least_latency() -> None:
    network = Network(370e9, 50e9, 8)
    members = network.shard_axis(64)
    for num_bytes, fastest in ((1e3, NCCL[0]), (64e6, NCCL[1]), (1e11, NCCL[2])):
        alone = Network(370e9, 50e9, 8, (fastest,))
        assert network.shard_seconds(num_bytes, members) == alone.shard_seconds(num_bytes, members)
