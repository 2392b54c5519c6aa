"""What a GPU needs for the gradient of an embedding: as planned, to the byte, and not its size where it need not."""

from __future__ import annotations

import pytest

from tests.pretended_cuda.embedding import CASES


@pytest.fixture(scope="module")
def needs(found_on_device) -> dict[str, list[int] | str]:
    """Planned and measured bytes of each case; or why it failed."""
    return found_on_device("tests.pretended_cuda.embedding")


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_the_gradient_needs(needs, name):
    assert isinstance(needs[name], list), needs[name]
    planned, measured = needs[name]
    assert planned == measured


def test_only_a_slot_of_16_bits_gets_a_gradient_as_large_as_the_table(needs):
    rows, table = 256 * 2048, 128256 * 2048
    assert [needs[name][1] for name in ("tied", "fp32", "gradients in bf16")] == [4 * rows, 0, 2 * table]
