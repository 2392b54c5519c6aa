"""One seed, one stream per rank; saved generator states give the same numbers again."""

from __future__ import annotations

import random

import numpy as np
import torch

from minift.dist.seeds import rng_state, seed_everything, set_rng_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_streams_repeat_and_differ_between_ranks_and_seeds() -> None:
    drawn = {}
    for seed in (0, 1):
        for rank in (0, 1):
            seed_everything(seed, rank)
            drawn[seed, rank] = draw()
            seed_everything(seed, rank)
            assert draw() == drawn[seed, rank]
    assert len(set(drawn.values())) == 4


def test_restored_generators_continue() -> None:
    seed_everything(3, 0)
    torch.rand(7)
    state = rng_state()
    expected = torch.rand(5)
    set_rng_state(state)
    assert torch.equal(torch.rand(5), expected)
