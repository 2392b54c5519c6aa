"""Validation loss against the plain mean over tokens in fp64, for any cut into batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minift.data.batch import IGNORE, Batch
from minift.eval.loss import mean_loss, perplexity
from minift.objectives.types import LossSum


class Table(nn.Module):
    """Loss of a token = its entry in a table; dropout would show if it were on."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = nn.Parameter(torch.linspace(0.1, 3.0, 50))
        self.dropout = nn.Dropout(0.5)


def table_objective(model: Table, batch: Batch) -> LossSum:
    assert not torch.is_grad_enabled()
    supervised = batch.targets_T[batch.targets_T != IGNORE]
    return LossSum(model.dropout(model.losses[supervised]).sum(), batch.num_targets)


def make_batch(targets: list[int]) -> Batch:
    length = len(targets)
    return Batch(torch.zeros(length, dtype=torch.int64), torch.arange(length),
                 torch.tensor([0, length], dtype=torch.int32), length, torch.tensor(targets))  # fmt: skip


@given(
    batches=st.lists(
        st.lists(st.integers(0, 49) | st.just(IGNORE), min_size=1, max_size=9), min_size=2, max_size=6
    ).filter(lambda batches: any(target != IGNORE for batch in batches for target in batch)),
    world_size=st.integers(1, 3),
    training=st.booleans(),
)
def test_mean_is_over_tokens_however_they_are_cut(batches, world_size, training):
    model = Table().train(training)
    shares: list[torch.Tensor] = []
    for rank in range(world_size):  # every rank's own sum; who reduces sees them all
        with pytest.raises(StopIteration):
            mean_loss(model, table_objective, map(make_batch, batches[rank::world_size]), torch.device("cpu"),
                      lambda total: (shares.append(total.clone()), next(iter(())))[0])  # fmt: skip
        assert model.training is training
    loss, weight = mean_loss(
        model, table_objective, map(make_batch, batches[::world_size]), torch.device("cpu"), lambda total: sum(shares)
    )

    targets = [target for batch in batches for target in batch if target != IGNORE]
    assert weight == len(targets)
    # fp32 sums of at most 9 entries below 3, then fp64: relative error below 9 * 2^-24
    assert loss == pytest.approx(model.losses.double()[targets].mean().item(), rel=9 * 2**-24)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="no supervised token"):
        mean_loss(Table(), table_objective, [make_batch([IGNORE])], torch.device("cpu"))


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(49152)) == pytest.approx(49152)
    assert perplexity(1e4) == math.inf
