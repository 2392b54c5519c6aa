"""Ranks agree on a fresh name whatever earlier attempts have left in the store. Threads and one store, no processes."""

from __future__ import annotations

import datetime
import random
import threading

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.dist.rendezvous import _agree_on_name

SOON = datetime.timedelta(seconds=30)


def meet(store: dist.Store, size: int, order: list[int]) -> list[str]:
    names = [""] * size

    def join(rank: int) -> None:
        names[rank] = _agree_on_name(store, rank, size, SOON)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@settings(max_examples=20)
@given(
    attempts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    died=st.sets(st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_each_attempt_has_one_name_of_its_own(attempts: list[int], died: set[int], seed: int) -> None:
    """Attempts of any sizes, in one store, after some ranks have asked and died without an answer."""
    store = dist.HashStore()
    for rank in died:
        store.set(f"ask/{rank}", "nobody waits for this answer")
    draw = random.Random(seed)
    used = []
    for size in attempts:
        names = meet(store, size, draw.sample(range(size), size))
        assert len(set(names)) == 1
        used.append(names[0])
    assert len(set(used)) == len(attempts)


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 have not come"):
        _agree_on_name(dist.HashStore(), 0, 3, datetime.timedelta(seconds=0.05))
