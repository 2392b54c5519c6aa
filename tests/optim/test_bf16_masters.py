"""AdamW with bf16 masters: what stochastic rounding makes of many small updates. Oracles: fp32 masters, and statistics.

All of this is deterministic. Bounds are six standard deviations: one seed in 10^8 would fail by chance.
"""

from __future__ import annotations

import pytest
import torch

from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

N = 2**14


def equal_weights(value, lr, num_steps, dtype, seed=0):
    """N weights `value` after steps with a constant gradient, each of which moves a weight by lr."""
    shard = FlatShard("s", torch.full((N,), value, dtype=dtype), torch.ones(N), [ParamRange("w", 0, N, 0, (N,))])
    optimizer = AdamW([shard], OptimConfig(lr=lr, rounding_seed=seed))
    for _ in range(num_steps):
        optimizer.step(1.0)
    return shard.master


@pytest.mark.parametrize("value, spacing", [(1.0, 2**-8), (-0.75, 2**-8), (3.0, 2**-6)])
def test_updates_of_a_ten_thousandth_are_kept_on_average(value, spacing):
    """Rounding to nearest loses them all, as they are below 1/40 of the spacing of bf16 there.

    One rounding, up with probability p = lr / spacing, has mean zero and a variance of at most spacing^2 p, so the mean
    of N weights after t steps has a standard deviation of at most sqrt(t spacing lr / N).
    """
    lr, steps = 1e-4 * abs(value), 100
    nearest = torch.tensor(value, dtype=torch.bfloat16)
    for _ in range(steps):
        nearest = (nearest.float() - lr).bfloat16()
    assert nearest == value

    mean = equal_weights(value, lr, steps, torch.bfloat16).double().mean().item()
    exact = equal_weights(value, lr, steps, torch.float32).double().mean().item()
    assert exact == pytest.approx(value - steps * lr, rel=1e-4)
    deviation = (steps * spacing * lr / N) ** 0.5
    assert 6 * deviation < steps * lr / 10  # so the test can tell kept from lost
    assert abs(mean - exact) <= 6 * deviation


def test_rounding_depends_on_the_seed_and_on_nothing_hidden():
    runs = [equal_weights(1.0, 1e-3, 3, torch.bfloat16, seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_every_step_rounds_anew():
    """Updates of half the spacing: after two steps, weights are one spacing lower, or two, or none."""
    below_one = 2**-8
    weights = equal_weights(1.0, below_one / 2, 2, torch.bfloat16)
    shares = [(weights == 1 - k * below_one).float().mean().item() for k in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=6 * 0.5 / N**0.5)


def test_equal_parameters_are_rounded_independently():
    """Of two parameters with equal weights and gradients, in one shard, at one step."""
    ranges = [ParamRange("a", 0, N, 0, (N,)), ParamRange("b", N, 2 * N, 0, (N,))]
    shard = FlatShard("s", torch.ones(2 * N, dtype=torch.bfloat16), torch.ones(2 * N), ranges)
    AdamW([shard], OptimConfig(lr=2**-9)).step(1.0)  # half the spacing
    moved = shard.master.view(2, N) != 1
    assert abs((moved[0] == moved[1]).float().mean() - 0.5) < 6 * 0.5 / N**0.5


def test_what_else_is_in_the_shard_changes_no_bit():
    """Parameters that are treated alike, which as fp32 masters would be updated as one."""

    def ones(name, ranges):
        n = ranges[-1].stop
        return FlatShard(name, torch.ones(n, dtype=torch.bfloat16), torch.ones(n), ranges)

    bounds = {"a": (0, 7), "b": (7, 37), "c": (37, 38)}
    ranges = [ParamRange(name, start, stop, 0, (stop - start,)) for name, (start, stop) in bounds.items()]
    together = ones("all", ranges)
    alone = [ones(r.name, [ParamRange(r.name, 0, r.stop - r.start, 0, r.full_shape)]) for r in ranges]
    for shards in ([together], alone):
        optimizer = AdamW(shards, OptimConfig(lr=2**-9))
        for _ in range(5):
            optimizer.step(1.0)
    assert torch.equal(together.master, torch.cat([shard.master for shard in alone]))


def test_padding_stays_zero():
    shard = FlatShard("s", torch.zeros(64, dtype=torch.bfloat16), torch.ones(64), [ParamRange("w", 0, 41, 0, (41,))])
    AdamW([shard], OptimConfig()).step(1.0)
    assert not shard.master[41:].any() and shard.master[:41].all()
