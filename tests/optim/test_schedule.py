"""Oracle: the lambdas of transformers, stepped through torch's LambdaLR. Both evaluate a handful of fp64 operations."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from minift.optim.config import OptimConfig
from minift.optim.schedule import Schedule

LR = 3e-4
runs = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: (pair[0], min(pair)))  # (total, warm-up)


def hf_rates(get_scheduler, total_steps, **arguments):
    """Learning rates of steps 0 .. total_steps - 1, the steps of the run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = get_scheduler(optimizer, **arguments)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(schedule):
    return [LR * schedule(step) for step in range(schedule.total_steps)]


@given(runs, st.sampled_from(["constant", "linear", "cosine"]))
def test_equals_transformers_at_every_step(run, name):
    total, warmup = run
    arguments = {"num_warmup_steps": warmup}
    if name != "constant":
        arguments["num_training_steps"] = total
    expected = hf_rates(getattr(transformers, f"get_{name}_schedule_with_warmup"), total, **arguments)
    assert our_rates(Schedule(name, warmup, total)) == pytest.approx(expected, rel=1e-12, abs=1e-12 * LR)


@given(runs.filter(lambda run: run[1] < run[0]), st.floats(0.0, 1.0))
def test_linear_with_minimum_is_transformers_polynomial_of_power_one(run, minimum):
    total, warmup = run
    if minimum == 1.0:  # transformers demands an end below the start
        minimum = 0.5
    expected = hf_rates(
        transformers.get_polynomial_decay_schedule_with_warmup,
        total,
        num_warmup_steps=warmup,
        num_training_steps=total,
        lr_end=minimum * LR,
        power=1.0,
    )
    schedule = Schedule("linear", warmup, total, minimum)
    assert our_rates(schedule) == pytest.approx(expected, rel=1e-12, abs=1e-12 * LR)


@given(runs.filter(lambda run: run[1] < run[0]), st.floats(0.0, 1.0))
def test_cosine_with_minimum_is_transformers_one_step_later(run, minimum):
    """transformers' version with a minimum counts the decay from 1, its version without, and ours, from 0."""
    total, warmup = run
    expected = hf_rates(
        transformers.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        total,
        num_warmup_steps=warmup,
        num_training_steps=total,
        min_lr_rate=minimum,
    )
    ours = our_rates(Schedule("cosine", warmup, total, minimum))
    assert ours[warmup + 1 :] == pytest.approx(expected[warmup:-1], rel=1e-12, abs=1e-12 * LR)


@given(runs, st.sampled_from(["constant", "linear", "cosine"]), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_stays_at_its_end_after_the_last_step(run, name, minimum, extra):
    schedule = Schedule(name, run[1], run[0], minimum)
    assert schedule(run[0] + extra) == pytest.approx(1.0 if name == "constant" else minimum, abs=1e-15)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps is 11.*has 10 steps"):
        Schedule.from_config(OptimConfig(warmup_steps=11), total_steps=10)
    assert Schedule.from_config(OptimConfig(warmup_steps=10), total_steps=10)(5) == 0.5
