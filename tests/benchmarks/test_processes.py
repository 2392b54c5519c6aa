"""Measured processes. Oracle: memory that each rank says it took."""

from __future__ import annotations

import mmap
import os
import time

import pytest
import torch.distributed as dist
from processes import RETURNING, PeakResident, Ranks, run_ranks

MIB = 2**20


def ask(world, tell, job):
    assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["SPECIAL"] == job
    if world.rank == 1 and job == "fail":
        raise ValueError("no")
    return world.rank, world.size


def take_memory(world, tell, num_bytes):
    for phase, size in (("little", num_bytes), ("much", 4 * num_bytes), ("little", num_bytes)):
        dist.barrier()
        time.sleep(0.2 * world.rank)  # rank 0 is ahead: what it holds already belongs to no phase yet
        tell(phase)
        block = bytearray(size)
        time.sleep(1.0)
        del block
        dist.barrier()


def test_ranks_answer_in_order_and_fail_by_name():
    assert run_ranks(2, ask, "go", {"SPECIAL": "go"}) == [(0, 2), (1, 2)]
    assert "SPECIAL" not in os.environ
    with pytest.raises(RuntimeError, match="rank 1:(.|\n)*ValueError: no"):
        run_ranks(2, ask, "fail", {"SPECIAL": "fail"})


def test_memory_is_summed_over_ranks_by_phase():
    with Ranks(2, take_memory, 32 * MIB, RETURNING) as ranks:
        peaks = ranks.watch()
        assert ranks.results() == [None, None]
    # Two ranks took 32 and then 128 MiB each; a tenth for what Python does beside.
    assert peaks["much"] - peaks["little"] == pytest.approx(2 * 96 * MIB, rel=0.1)


def test_peak_resident():
    """Of pages that are the system's again: a heap may have as many left that are resident anyway."""
    peak = PeakResident()
    with mmap.mmap(-1, 64 * MIB) as block:
        for page in range(0, 64 * MIB, mmap.PAGESIZE):
            block[page] = 1
    assert peak.bytes() - peak.held_bytes == pytest.approx(64 * MIB, rel=0.1)
