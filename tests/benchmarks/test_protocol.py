"""The measuring protocol. Oracles: a clock and a /proc that are made up, arithmetic on planted times."""

from __future__ import annotations

import math
import os
import statistics
import time

import protocol
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocol import Load, Times, check_close, check_losses, stopwatch, take_turns, wait_until_quiet

seconds = st.floats(1e-3, 1e3)


@pytest.fixture
def nobody_else(monkeypatch):
    """A machine on which nobody else works, with a clock that only `work` moves."""
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(protocol.Load, "_read", staticmethod(lambda: None))
    return now


# Turns #


@pytest.mark.parametrize("rounds", [1, 4])
def test_variants_take_turns_and_the_outer_ones_follow_themselves(nobody_else, rounds):
    order = []

    def turn(name):
        return lambda: order.append(name) or float(len(order))

    times = take_turns({name: turn(name) for name in "abc"}, rounds)
    assert "".join(order) == ("abc" + "cba" + "abc" + "cba")[: 3 * rounds]
    assert all(len(values) == rounds for values in times.seconds.values())
    assert times.seconds["c"][:2] == [3.0, 4.0][:rounds]


def test_a_stopwatch_counts_what_lies_between_the_barriers(nobody_else):
    events = []

    def work():
        events.append("work")
        nobody_else[0] += 3.0

    def barrier():
        events.append("barrier")
        nobody_else[0] += 100.0 if len(events) == 1 else 0.5  # waiting before does not count, waiting after does

    assert stopwatch(work, barrier, calls=2)() == (2 * 3.0 + 0.5) / 2
    assert events == ["barrier", "work", "work", "barrier"]


# Ratios #


@given(st.lists(st.tuples(seconds, seconds, st.floats(0, 1)), min_size=1, max_size=20))
def test_a_ratio_is_of_neighbours_in_quiet_rounds(rounds):
    slow, fast, foreign = (list(values) for values in zip(*rounds, strict=True))
    times = Times({"slow": slow, "fast": fast}, foreign)
    counted = [(a, b) for a, b, share in rounds if share <= protocol.QUIET_SHARE]
    assert times.is_quiet == (2 * len(counted) >= len(rounds))
    if not times.is_quiet:
        counted = [(a, b) for a, b, _ in rounds]
    ratio = times.ratio("slow", "fast")
    assert ratio.median == statistics.median(a / b for a, b in counted)
    assert times.median("fast") == statistics.median(b for _, b in counted)
    assert times.fastest("slow") == min(a for a, _ in counted)
    assert min(a / b for a, b in counted) <= ratio.low <= ratio.median <= ratio.high <= max(a / b for a, b in counted)


def test_other_load_meets_both_sides():
    """A machine that gets slower all the time: medians of each side alone say nothing, neighbours say 2."""
    clock = [1.01**turn for turn in range(40)]
    a = [clock[2 * n + n % 2] for n in range(20)]
    b = [2 * clock[2 * n + 1 - n % 2] for n in range(20)]
    assert Times({"a": a, "b": b}).ratio("b", "a").median == pytest.approx(2.0, rel=0.011)


@given(st.floats(0.5, 2.0), st.integers(0, 2**32))
def test_what_equals_itself_is_noise_and_twice_the_time_is_none(speed, seed):
    """Turns that scatter by 2 %: medians of 15 of their ratios lie within 2 %, whatever the speed."""
    generator = torch.Generator().manual_seed(seed)
    jitter = 1 + 0.02 * torch.rand(2, 15, generator=generator).double()
    same = Times({"a": (speed * jitter[0]).tolist(), "b": (speed * jitter[1]).tolist()})
    assert same.ratio("a", "b").noise < 1.02
    double = Times({"a": (2 * speed * jitter[0]).tolist(), "b": (speed * jitter[1]).tolist()})
    assert not double.ratio("a", "b").is_noise


def test_noise_comes_from_the_variants_that_follow_themselves():
    """b ends round 0 and begins round 1, a ends round 1 and begins round 2; the pairs between them do not count."""
    times = Times({"a": [1.0, 8.0, 16.0], "b": [2.0, 4.0, 1.0]})  # b: 2 / 4, a: 8 / 16
    assert times.noise(1) == pytest.approx(2.0)
    times = Times({"a": [1.0, 8.0, 8.0], "b": [4.0, 4.0, 1.0]})
    assert times.noise(1) == 1.0


# Equality #


def test_different_results_are_refused():
    expected = torch.tensor([100.0, 1.0])
    check_close("same", expected, torch.tensor([100.9, 1.0]), 0.01)
    with pytest.raises(ValueError, match="product: results differ by 2.0e-02 of the largest"):
        check_close("product", expected, torch.tensor([100.0, 3.0]), 0.01)
    with pytest.raises(ValueError, match="product"):
        check_close("product", expected, torch.tensor([100.0, math.nan]), 0.01)


def test_different_losses_are_refused():
    check_losses({"a": [2.0, 1.0], "b": [2.01, 1.0]}, 0.01)
    with pytest.raises(ValueError, match="step 1: the loss of c is 1.1, of a 1.0"):
        check_losses({"a": [2.0, 1.0], "b": [2.0, 1.0], "c": [2.0, 1.1]}, 0.01)


# The load #


@pytest.mark.parametrize("own_ends", [False, True])
def test_others_count_and_this_process_group_does_not(tmp_path, monkeypatch, own_ends):
    """A made-up /proc of 2 processors over 2 seconds: 80 ticks of this process, 60 of its child, which may end and is
    then in this one's account; 25 of somebody else, 15 stolen by the host. So others had 40 of 400 ticks."""
    hertz, now = 100, [0.0]
    monkeypatch.setattr(protocol, "PROC", tmp_path)
    monkeypatch.setattr(protocol.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(protocol.os, "sysconf", lambda name: hertz)
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def write(own: int, child: int, reaped: int, other: int, stolen: int) -> None:
        total = 5000 + own + child + reaped + other
        (tmp_path / "stat").write_text(f"cpu  {total} 0 0 99 5 0 0 {stolen} 0 0\ncpu0 0 0 0 0\n")
        for pid, group, ticks in ((10, os.getpgrp(), (own, 0, reaped, 0)), (11, os.getpgrp(), (0, child, 0, 0)),
                                  (12, os.getpgrp() + 1, (0, other, 0, 0))):  # fmt: skip
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            fields = ["R", "1", str(group), *["0"] * 8, *map(str, ticks), "20"]
            (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) b) {' '.join(fields)}")

    write(own=100, child=50, reaped=0, other=70, stolen=3)
    load = Load()
    now[0] = 2.0
    write(own=180, child=0 if own_ends else 110, reaped=110 if own_ends else 0, other=95, stolen=18)
    assert load.foreign_share() == 0.1
    now[0] += Load.shortest_s / 2  # too short to tell: what was found before
    write(own=180, child=110, reaped=0, other=995, stolen=18)
    assert load.foreign_share() == 0.1


def test_this_machine_has_a_load():
    load = Load()
    time.sleep(1.1 * Load.shortest_s)
    assert 0 <= load.foreign_share() <= 1 and load._at is not None


def test_a_busy_machine_is_refused(monkeypatch):
    shares = iter([0.9, 0.9, 0.05, *[0.5] * 100])
    monkeypatch.setattr(protocol.Load, "foreign_share", lambda self: next(shares))
    monkeypatch.setattr(protocol.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    wait_until_quiet(patience_s=10)
    assert now[0] == 3.0
    with pytest.raises(SystemExit, match="others use 50% of the processors"):
        wait_until_quiet(patience_s=10)
    assert 13.0 <= now[0] <= 15.0
