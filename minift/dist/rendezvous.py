"""The key-value store through which processes find each other, fresh.

torchrun keeps one store for as long as the launcher lives, and its workers use it too. After a restart it is full of
what dead processes have left, addresses above all, under the very names that the living ones look for: gloo then
connects to ports where nobody listens (pytorch issue 135712; torch 2.13 still does it). The number of the attempt in
the environment does not help, because launchers on different machines count for themselves.

So the ranks first agree on a name that nobody can have used, and then use the store below that name only:

    rank r   ask/r = a nonce of its own                         rank 0   draws the name
             waits for answer/r/<nonce>, which is the name  <---         answers whatever nonce it finds in ask/r,
             ack/r/<name>                                   --->         old ones too, until all have acknowledged
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.005


def fresh_store(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Meet at the address in the environment (MASTER_ADDR, MASTER_PORT). TimeoutError on rank 0 names the missing."""
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(_agree_on_name(store, rank, size, timeout), store)


def _agree_on_name(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    if rank != 0:
        nonce = uuid.uuid4().hex
        store.set(f"ask/{rank}", nonce)
        name = store.get(f"answer/{rank}/{nonce}").decode()
        store.set(f"ack/{rank}/{name}", "")
        return name
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, size))
    answered: dict[int, bytes] = {}
    while missing:
        for peer in sorted(missing):
            if store.check([f"ask/{peer}"]) and (nonce := store.get(f"ask/{peer}")) != answered.get(peer):
                store.set(f"answer/{peer}/{nonce.decode()}", name)
                answered[peer] = nonce
            if store.check([f"ack/{peer}/{name}"]):
                missing.remove(peer)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout.total_seconds():.0f} s ranks {sorted(missing)} of {size} have not come")
        time.sleep(_POLL_S)
    return name
