"""Validation loss: the objective over a set of batches, summed, divided once.

The same objective as in training, without gradient and with adapter dropout off. A mean of batch means would weigh a
token by the length of its batch; sum of losses over sum of weights does not, so the number is the same for every number
of ranks and every way to pack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minift.data.batch import Batch
from minift.objectives.types import LossSum


def mean_loss(
    model: nn.Module,
    objective: Callable[[nn.Module, Batch], LossSum],
    batches: Iterable[Batch],
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[float, int]:
    """(mean loss in nats, weight it is the mean over), both over all ranks; for SFT the weight is supervised tokens.

    `batches`: this rank's. Every rank must bring equally many, because a sharded model gathers its weights in every
    forward; batches without a target are fine. `sum_over_ranks` gets one fp64 tensor of shape (2,).

    The model comes back in the mode (train or eval) it was in. Raises `ValueError` when there was no target at all.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss sum, weight
    try:
        with torch.no_grad():
            for batch in batches:
                loss = objective(model, batch.to(device))
                total[0] += loss.loss_sum
                total[1] += loss.weight
    finally:
        model.train(was_training)
    loss_sum, weight = sum_over_ranks(total).tolist()
    if weight == 0:
        raise ValueError("the validation data has no supervised token; is its template's assistant part empty?")
    return loss_sum / weight, round(weight)


def perplexity(mean_loss_nats: float) -> float:
    """exp of the mean loss: among how many equally likely tokens the model is undecided. Infinite above 709 nats."""
    return math.exp(mean_loss_nats) if mean_loss_nats < 709 else math.inf
