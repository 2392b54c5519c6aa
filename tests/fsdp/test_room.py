"""Where memory that all ranks share is short. Oracle: one process without the engine."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from torch import Tensor

from minift.dist.process import World
from minift.fsdp import shared_memory
from minift.precision import Precision
from tests.fsdp.oracle import expected_gradients
from tests.fsdp.trees import BF16, FP32, Case, gathered_gradients, run_microbatches, sharded
from tests.ranks import run_ranks


def shared_bytes() -> int:
    """That this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/minift-" in line]
    bounds = [[int(bound, 16) for bound in fields[0].split("-")] for fields in lines]
    return sum(stop - start for start, stop in bounds)


def resident_without_room(world: World, case: Case, share: float) -> tuple[list[bool], dict[str, Tensor]]:
    """With this share of the shared memory that the model takes if there is enough."""
    gc.collect()
    before = shared_bytes()
    model, engine = sharded(case, world)
    limit = before + int(share * (shared_bytes() - before))
    del model, engine
    gc.collect()
    make_file = shared_memory._make_file
    with pytest.MonkeyPatch.context() as patch:
        is_room = lambda num_bytes: shared_bytes() + num_bytes <= limit  # noqa: E731
        patch.setattr(shared_memory, "_make_file", lambda path, size: is_room(size) and make_file(path, size))
        model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    return [bucket.resident for bucket in engine.buckets], gathered_gradients(engine)


@pytest.mark.parametrize(("share", "kinds"), [(0.95, {True, False}), (0.8, {True, False}), (0.6, {False})])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_what_does_not_fit_into_shared_memory_is_gathered(precision: Precision, share: float, kinds: set) -> None:
    """There is room for the buffers, and for an export, too: what is resident makes it."""
    case = Case(2, 32, 256, depth=8, vocab=64, tied=False, precision=precision)
    expected = expected_gradients(case)
    for resident, gradients in run_ranks(2, resident_without_room, case, share):
        assert set(resident) == kinds
        for name, gradient in gradients.items():
            assert expected[name].admits(gradient), name
