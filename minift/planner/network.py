"""How long collectives take on a network of nodes, inside of which links are fast and between which they are slower.

Each rank sends and receives (N - 1)/N of the bytes of an all-gather or reduce-scatter among N ranks, twice that of an
all-reduce, so with n ranks of the group on each of m nodes (N = n m)

    seconds = steps + bytes · (N - 1)/N / min(inside, n · between)       without `inside` if n = 1, `between` if m = 1

`between` is multiplied by n because every rank has a network interface of its own, and rings are laid so that all of a
node's are busy. (A group that takes one rank of every node, as HSDP's sums over replicas do, uses one of them.)

`steps` is the latency of the algorithm. In a ring every chunk passes every rank: base + (N - m) hops inside + (m - 1)
between; an all-reduce, twice, or through trees, 2 (n - 1) hops inside and 2 log2(m) between. NCCL has three protocols
that trade bandwidth for latency, and takes the fastest; so does `seconds`. Constants and formulas: NCCL,
src/graph/tuning.cc (ncclTopoTuneModel, ncclTopoGetAlgoTime). gloo's transports of minift (`fsdp/transport.py`) exchange
every pair's chunk directly: one step, whatever N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Seconds before anything, and for every hop of a ring or tree; the share of the bandwidth that is left."""

    base_s: float = 0.0
    inside_hop_s: float = 0.0
    between_hop_s: float = 0.0
    bandwidth_share: float = 1.0


# Ring latencies of LL, LL128 and Simple (hwLat, baseLat of tuning.cc; LL sends 8 bytes to carry 4, and polls).
NCCL = (
    Protocol(3.6e-6, 0.47e-6, 2.7e-6, 0.25),
    Protocol(10.0e-6, 1.9e-6, 4.0e-6, 0.92),
    Protocol(8.4e-6, 3.4e-6, 9.6e-6),
)


@dataclass(frozen=True)
class Members:
    """A group of ranks that communicate: how many there are, and how many of them on each node."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Network:
    """inside: between ranks of one node; between: of each rank's interface to other nodes; bytes per second each way.

    ranks_per_node: how many there are. protocols: what to choose from; see the module docstring.
    meet_s: of an all-reduce of a number, where that was measured; None: what `sum_seconds` says.
    sum_share: of the bandwidth, what an all-reduce gets.
    host_s_per_byte: processor time of a rank for every byte that it sends and receives, where that is taken from
    computing: on CPUs that have nothing else to send with.
    """

    inside_bytes_per_s: float
    between_bytes_per_s: float
    ranks_per_node: int
    protocols: tuple[Protocol, ...] = NCCL
    meet_s: float | None = None
    sum_share: float = 1.0
    host_s_per_byte: float = 0.0

    def shard_axis(self, shard_size: int) -> Members:
        """The ranks that one copy of a model is cut over: neighbours."""
        return Members(shard_size, min(shard_size, self.ranks_per_node))

    def replica_axis(self, world_size: int, shard_size: int) -> Members:
        """The ranks that hold the same shard: every `shard_size`-th."""
        size = world_size // shard_size
        return Members(size, min(size, max(1, self.ranks_per_node // shard_size)))

    def shard_seconds(self, full_bytes: float, members: Members) -> float:
        """An all-gather to, or a reduce-scatter from, `full_bytes` on every rank."""
        if members.size == 1:
            return 0.0
        moved = full_bytes * (members.size - 1) / members.size
        inside_hops, between_hops = members.size - members.nodes, members.nodes - 1
        return min(self._seconds(p, moved, members, inside_hops, between_hops) for p in self.protocols)

    def sum_seconds(self, num_bytes: float, members: Members) -> float:
        """An all-reduce of `num_bytes`."""
        if members.size == 1:
            return 0.0
        moved = 2 * num_bytes * (members.size - 1) / members.size / self.sum_share
        ring = 2 * (members.size - members.nodes), 2 * (members.nodes - 1)
        tree = 2 * (members.per_node - 1), 2 * math.ceil(math.log2(members.nodes))
        return min(self._seconds(p, moved, members, *hops) for p in self.protocols for hops in (ring, tree))

    def meet_seconds(self, members: Members) -> float:
        """Until all have heard of all."""
        alone = members.size == 1
        return self.sum_seconds(8, members) if self.meet_s is None else 0.0 if alone else self.meet_s

    def bytes_per_s(self, members: Members) -> float:
        """What each rank of the group can send, each way, in the long run."""
        inside = self.inside_bytes_per_s if members.per_node > 1 else math.inf
        between = members.per_node * self.between_bytes_per_s if members.nodes > 1 else math.inf
        return min(inside, between)

    def _seconds(self, p: Protocol, moved: float, members: Members, inside_hops: int, between_hops: int) -> float:
        latency = p.base_s + inside_hops * p.inside_hop_s + between_hops * p.between_hop_s
        return latency + moved / (self.bytes_per_s(members) * p.bandwidth_share)
