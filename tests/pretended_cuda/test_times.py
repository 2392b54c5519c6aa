"""How long a step is that sends something to host memory and back: the planner's simulation, against the engine itself
with a clock on every stream of a device that is not there.

What the plan leaves out (scalars that cross the bus) is below a thousandth.
"""

from __future__ import annotations

import pytest

from tests.pretended_cuda.times import CASES


@pytest.fixture(scope="module")
def seconds(found_on_device) -> dict[str, list[float] | str]:
    """Planned and measured, of each case; or why it failed."""
    return found_on_device("tests.pretended_cuda.times")


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_is_planned(seconds, name):
    assert isinstance(seconds[name], list), seconds[name]
    planned, measured = seconds[name]
    assert planned == pytest.approx(measured, rel=1e-3)
