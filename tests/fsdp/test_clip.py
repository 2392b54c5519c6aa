"""The global norm over shards and clipping by it. Oracle: torch.nn.utils.clip_grad_norm_ on one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.dist.collectives import sum_over_ranks
from minift.dist.process import World
from minift.fsdp.clip import clip_factor, local_square_sum
from tests.fsdp.oracle import reference_gradients, relative_error
from tests.fsdp.trees import Case, cases, gathered_gradients, run_microbatches, sharded
from tests.ranks import DEVICE, run_ranks


def norm_and_gradients(world: World, case: Case) -> tuple[float, dict[str, Tensor]]:
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    squares = sum_over_ranks(local_square_sum(engine.trainable_shards(), world.device), engine.shard_world)
    return float(squares.sqrt()), gathered_gradients(engine)


@settings(max_examples=15, deadline=None, phases=(Phase.generate,))
@given(case=cases(), share=st.sampled_from([1e-3, 0.3, 0.9, 2.0]))
def test_clipping_against_torch(case: Case, share: float) -> None:
    """Clip at a share of the norm. Squares are added in fp32 within a shard: 1e-6; the product adds one rounding."""
    expected = reference_gradients(case)
    parameters = [nn.Parameter(torch.empty_like(g)) for g in expected.values()]
    for parameter, gradient in zip(parameters, expected.values(), strict=True):
        parameter.grad = gradient
    max_norm = share * float(torch.nn.utils.get_total_norm(expected.values()))
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    for ours, gradients in run_ranks(case.world_size, norm_and_gradients, case):
        assert ours == pytest.approx(norm, rel=1e-6)
        factor = float(clip_factor(torch.tensor(ours, dtype=torch.float64), max_norm))
        for name, parameter in zip(expected, parameters, strict=True):
            assert relative_error(gradients[name] * factor, parameter.grad) <= 2e-6, name


@given(norm=st.floats(0.0, allow_infinity=False), max_norm=st.floats(0.0, exclude_min=True, allow_infinity=False))
def test_the_factor_is_python_s(norm: float, max_norm: float) -> None:
    """In fp64 and with every rounding, so that it does not matter who computes it."""
    factor = clip_factor(torch.full((), norm, dtype=torch.float64, device=DEVICE), max_norm)
    assert float(factor) == min(1.0, max_norm / (norm + 1e-6))


def test_no_maximum_means_no_clipping() -> None:
    norms = torch.tensor([1e9, 0.5, 2.0], dtype=torch.float64)
    assert clip_factor(norms[0], None) == 1.0
    assert clip_factor(norms[1], 1.0) == 1.0
    assert float(clip_factor(norms[2], 1.0)) == pytest.approx(0.5)
