"""A training step on a GPU, as far as no GPU is needed to see it: devices agree, nothing asks for values, and the host
waits once, when the step's loss and norm are known, before anything is updated."""

from __future__ import annotations

import pytest

from tests.pretended_cuda.steps import CASES


@pytest.fixture(scope="module")
def steps(found_on_device) -> dict[str, dict[str, list[str]] | str]:
    """Of each case, where its step waits and what nothing puts in order; or why it failed."""
    return found_on_device("tests.pretended_cuda.steps")


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_a_step(steps, name):
    """Where gradients are kept in host memory, the host also waits for those of each unit in each microbatch, but not
    before the next unit's work was given to the device."""
    found = steps[name]
    assert isinstance(found, dict), found
    num_units, policy = 4, CASES[name].policy
    offloads = num_units * (1 if policy.step_in_backward else 2) if policy.offload else 0
    assert found["waits"] == ["streams.py:wait_for"] * offloads + ["step.py:train_step"]


@pytest.mark.parametrize("name", CASES)
def test_streams_and_host_wait_for_each_other(steps, name):
    assert not steps[name]["mistakes"]
