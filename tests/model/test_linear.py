"""`linear` and `Linear`. Oracle: torch's own autograd of `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minift.model.linear import Linear, linear


def count_saved(run) -> list[tuple[int, ...]]:
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        run()
    return saved


@given(
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    has_bias=st.booleans(),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_values_and_gradients(leading, sizes, has_bias, trained):
    """In float64, to 1e-12: the same sums in possibly another order."""
    out_features, in_features = sizes

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inputs = [make(*leading, in_features), make(out_features, in_features), make(out_features) if has_bias else None]
    dy = make(*leading, out_features)

    def run(function) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [
            None if x is None else x.clone().requires_grad_(needs) for x, needs in zip(inputs, trained, strict=True)
        ]
        y = function(*leaves)
        if y.requires_grad:
            y.backward(dy)
        return y.detach(), [None if leaf is None else leaf.grad for leaf in leaves]

    y, gradients = run(linear)
    expected_y, expected_gradients = run(F.linear)
    assert torch.equal(y, expected_y)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_the_input_is_saved_only_for_a_trained_weight_and_the_weight_never(trained):
    layer = Linear(3, 5, bias=True)
    layer.weight.requires_grad_(trained)
    x = torch.randn(7, 3, requires_grad=True)
    assert count_saved(lambda: layer(x)) == ([(7, 3)] if trained else [])


def test_gradients_have_the_weights_dtype():
    layer = Linear(4, 3, bias=True).bfloat16()
    layer(torch.randn(5, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.bfloat16


def test_nothing_is_recorded_when_nothing_is_trained():
    layer = Linear(4, 3).requires_grad_(False)
    assert layer(torch.randn(2, 4)).grad_fn is None


def test_linear_base_protocol():
    layer = Linear(4, 3, bias=True)
    assert (layer.in_features, layer.out_features) == (4, 3)
    assert layer.dense_weight().data_ptr() == layer.weight.data_ptr()
    assert not layer.dense_weight().requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in Linear(4, 3).named_parameters()] == ["weight"]
