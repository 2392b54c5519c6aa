"""Seconds of operations on a device. Oracles: arithmetic by hand; rates from which the samples were made."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.planner.device import Deviation, Device, Rate
from minift.planner.op import Op

RATES = {"linear": Rate(1e-6, 1e12), "linear float32": Rate(2e-6, 1e11), "*": Rate(bytes_per_s=1e9)}
LINEAR, NARROW, ADD = (
    Op("linear", "bfloat16", 8e6, 1e9, 3),
    Op("linear", "float32", 8e6, 1e9),
    Op("add", "bfloat16", 4e6),
)


def device(**changes: object) -> Device:
    return Device("some", 1e9, 1e12, 1e9, RATES, **changes)


def test_the_most_special_figures_count() -> None:
    assert device().seconds([LINEAR]) == pytest.approx(3 * (1e-6 + 1e-3))
    assert device().seconds([NARROW]) == pytest.approx(2e-6 + 1e-2)
    assert device().seconds([ADD, ADD]) == pytest.approx(2 * 4e-3)
    with pytest.raises(ValueError, match="'add' in bfloat16"):
        Device("bare", 1, 1, 1, {"linear": Rate()}).seconds([ADD])


def test_a_host_works_beside_a_gpu_and_before_a_cpu() -> None:
    alone = device().seconds([LINEAR, ADD])
    assert device(call_s=1.0).seconds([LINEAR, ADD]) == pytest.approx(alone + 4.0)
    assert device(call_s=1.0, runs_ahead=True).seconds([LINEAR, ADD]) == 4.0
    assert device(call_s=1e-6, runs_ahead=True).seconds([LINEAR, ADD]) == alone


@given(st.floats(0.5, 4), st.lists(st.sampled_from([LINEAR, NARROW, ADD]), max_size=5))
def test_slower_is_slower_in_everything(factor: float, ops: list[Op]) -> None:
    some = device(call_s=1e-4)
    assert some.slower(factor).seconds(ops) == pytest.approx(factor * some.seconds(ops))


def test_samples_speak_for_what_is_near() -> None:
    rate = Rate(0.0, 1e9, deviations=(Deviation(1e6, 1e6, 2.0), Deviation(1e12, 1e12, 0.5)))
    ratios = [rate.seconds(Op("linear", "float32", n, n)) / (n / 1e9) for n in (1e6, 1e9, 1e12)]
    assert ratios == pytest.approx([2.0, 1.0, 0.5], rel=0.05)
    without_flops = Rate(0.0, bytes_per_s=1e9, deviations=(Deviation(0.0, 1e6, 3.0),))
    assert without_flops.seconds(Op("add", "float32", 1e6)) == pytest.approx(3e-3, rel=0.06)
    assert math.isfinite(without_flops.seconds(Op("add", "float32", 1e12)))
