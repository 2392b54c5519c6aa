"""Starting a world. Each case runs in a process of its own, because a process group is process-wide state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from minift.dist.collectives import barrier, gather_objects, max_over_ranks, sum_over_ranks
from minift.dist.process import World
from tests.ranks import run_ranks

ALONE = """
from minift.dist.process import init_world, shutdown
from minift.dist.collectives import gather_objects, sum_over_ranks
world = init_world("cpu")
print(world.rank, world.size, world.backend, world.is_main)
print(float(sum_over_ranks(2.5, world)), gather_objects("x", world))
shutdown(); shutdown()
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_a_process_alone_is_a_world_of_one() -> None:
    result = python(ALONE)
    assert result.stdout.split() == ["0", "1", "gloo", "True", "2.5", "['x']"], result.stderr


@pytest.mark.parametrize(
    ("device", "environment", "sentence"),
    [
        ("tpu", {}, "device is 'tpu'; valid: auto, cpu, cuda"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": ""}, "torch sees no GPU"),
    ],
)
def test_an_impossible_device_is_refused(device: str, environment: dict[str, str], sentence: str) -> None:
    result = python(f"from minift.dist.process import init_world; init_world({device!r})", **environment)
    assert result.returncode != 0 and sentence in result.stderr


def collect(world: World) -> tuple[float, float, list[int]]:
    barrier(world)
    # 2**24 + 1 is not an fp32 number: counts of tokens must not be summed in fp32
    total = float(sum_over_ranks(2**24 + world.rank, world))
    return total, float(max_over_ranks(world.rank, world)), gather_objects(10 * world.rank, world)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_collectives(n: int) -> None:
    expected = (float(sum(2**24 + rank for rank in range(n))), float(n - 1), [10 * rank for rank in range(n)])
    assert run_ranks(n, collect) == [expected] * n
