"""Ranks under a budget. Oracle: all of them, tried."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.peft.ranks import allocate_ranks

FALLING = st.lists(st.integers(0, 50), min_size=1, max_size=4).map(lambda gains: sorted(gains, reverse=True))
CASES = st.lists(st.tuples(FALLING, st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4)


def total(gains: dict[str, list[int]], ranks: dict[str, int]) -> int:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


@given(CASES, st.integers(0, 40))
def test_no_other_ranks_within_the_budget_are_worth_more(cases: list[tuple[list[int], int, int]], extra: int) -> None:
    gains = {f"p{index}": of_one for index, (of_one, _, _) in enumerate(cases)}
    costs = {f"p{index}": cost * step for index, (_, cost, step) in enumerate(cases)}
    budget = sum(costs.values()) + extra
    ranks = allocate_ranks(gains, costs, budget)
    tried = itertools.product(*(range(1, len(of_one) + 1) for of_one in gains.values()))
    choices = (dict(zip(gains, of_all, strict=True)) for of_all in tried)
    affordable = [r for r in choices if sum(costs[name] * rank for name, rank in r.items()) <= budget]
    assert ranks in affordable
    assert total(gains, ranks) == max(total(gains, other) for other in affordable)


def test_equal_costs_go_to_the_largest_gains_and_use_the_budget_up() -> None:
    gains = {"a": [5.0, 4.0, 3.0, 2.0], "b": [9.0, 1.0, 0.5, 0.1]}
    assert allocate_ranks(gains, {"a": 1024, "b": 1024}, 4 * 1024) == {"a": 3, "b": 1}


def test_a_budget_below_rank_1_is_refused() -> None:
    with pytest.raises(ValueError, match="29 parameters are too few for rank 1 in 2 projections; valid: >= 30"):
        allocate_ranks({"a": [1.0], "b": [1.0]}, {"a": 10, "b": 20}, 29)
