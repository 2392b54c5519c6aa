"""A network of slow links on one machine: a network namespace for each rank, joined by a bridge, and a kernel that lets
no more than so many bytes a second leave each of them. TCP, congestion and what it costs the processors are real.

    with SlowNetwork(num_ranks) as network:            needs root (CAP_NET_ADMIN), and `ip` and `tc` of iproute2
        ...                                            in the process of rank r:
        group = network.enter(r, bytes_per_second)     a gloo group of all ranks over the links

`SlowNetwork.available()` says whether this can work here.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass

import torch.distributed as dist

_CLONE_NEWNET = 0x40000000
_INTERFACE = "eth0"
_BURST_BYTES = 1 << 17  # may leave at once: two of the largest packets


@dataclass(frozen=True)
class SlowNetwork:
    """Namespaces <name>0, <name>1, ..., and a bridge <name>."""

    num_ranks: int
    name: str = "minift"

    def __enter__(self) -> SlowNetwork:
        self.__exit__()
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "link", "set", self.name, "up")
        for rank in range(self.num_ranks):
            space, outside = f"{self.name}{rank}", f"{self.name}v{rank}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", _INTERFACE, "netns", space)
            _run("ip", "link", "set", outside, "master", self.name, "up")
            _run("ip", "-n", space, "addr", "add", f"10.203.0.{rank + 1}/24", "dev", _INTERFACE)
            _run("ip", "-n", space, "link", "set", _INTERFACE, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for rank in range(self.num_ranks):
            subprocess.run(["ip", "netns", "del", f"{self.name}{rank}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.name], capture_output=True, check=False)

    @staticmethod
    def available() -> bool:
        try:
            with SlowNetwork(1, "minifttry"):
                space = ["ip", "netns", "exec", "minifttry0"]
                _run(*space, "tc", "qdisc", "add", "dev", _INTERFACE, "root", *_limit(1e6))
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def enter(self, rank: int) -> dist.ProcessGroup:
        """From now on this thread, and what gloo begins in it, is in the namespace of `rank`. Collective."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{self.name}{rank}") as space:
            if libc.setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the network namespace")
        os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACE
        group = dist.new_group(list(range(self.num_ranks)), backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    @staticmethod
    def limit(bytes_per_second: float) -> None:
        """What may leave this rank from now on; to be called inside."""
        _run("tc", "qdisc", "replace", "dev", _INTERFACE, "root", *_limit(bytes_per_second))


def _limit(bytes_per_second: float) -> list[str]:
    rate = f"{round(8 * bytes_per_second)}bit"
    return ["tbf", "rate", rate, "burst", str(_BURST_BYTES), "latency", "200ms"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
