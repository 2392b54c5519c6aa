"""A training step on a GPU, as far as no GPU is needed to see it: devices agree, nothing asks for values, and the host
waits once, for the step's loss and norm, when the device has been given the updates that come after them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pretended_cuda.steps import CASES


@pytest.fixture(scope="module")
def steps(found_on_device) -> dict[str, dict[str, Any] | str]:
    """Of each case, what `steps.run` found; or why it failed."""
    return found_on_device("tests.pretended_cuda.steps")


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_once_a_step(steps, name):
    """Where gradients are kept in host memory, the host also waits for those of each unit in each microbatch, but not
    before the next unit's work was given to the device; and for the factor of updates that it makes itself."""
    found = steps[name]
    assert isinstance(found, dict), found
    num_units, policy = 4, CASES[name].policy
    offloads = num_units * (1 if policy.step_in_backward else 2) if policy.offload else 0
    factor = ["adamw.py:_as_tensor"] * (policy.offload and not policy.step_in_backward)
    assert found["waits"] == ["streams.py:wait_for"] * offloads + factor + ["step.py:wait"]


@pytest.mark.parametrize("name", CASES)
def test_the_host_does_not_wait_for_the_updates(steps, name):
    """All of them were given to the device before, but for those made in backward, which loss and norm come after."""
    found, policy = steps[name], CASES[name].policy
    assert (found["updates"] > 0) == (not policy.offload)
    assert found["updates_ahead"] == (0 if policy.step_in_backward else found["updates"])


@pytest.mark.parametrize("name", CASES)
def test_streams_and_host_wait_for_each_other(steps, name):
    assert not steps[name]["mistakes"]
