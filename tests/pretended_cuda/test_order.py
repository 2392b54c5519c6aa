"""What `order` finds: one mistake where one wait is left out, and none where it is there."""

from __future__ import annotations

from tests.pretended_cuda.programs import PROGRAMS


def test_a_wait_that_is_left_out_is_found(found_on_device):
    found = found_on_device("tests.pretended_cuda.programs")
    assert found == {program.__name__: [0, 1] for program in PROGRAMS}
