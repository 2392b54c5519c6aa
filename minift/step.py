"""One optimizer step: the same for every objective, strategy and number format.

The loss is a sum, divided once by the weight of the whole step over all ranks and microbatches, which is known before
the first backward. So a step is the same however its examples are spread. Not here: the loop (`train`), when what is
communicated (`fsdp`), the schedule (`optim`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.data.batch import Batch
from minift.dist.collectives import scalars, sum_over_ranks
from minift.fsdp import ShardedModel
from minift.fsdp.clip import clip_factor, local_square_sum
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.loss_scaler import LossScaler
from minift.optim.shard import FlatShard
from minift.trace import Recorder


class NonFiniteError(ArithmeticError):
    """A loss or gradient became infinite or NaN."""


@dataclass(frozen=True)
class StepResult:
    """Global values: the same on every rank."""

    loss: float  # mean over the step's weight
    grad_norm: float  # before clipping; not finite if the step was skipped
    weight: float
    tokens: int
    was_skipped: bool  # fp16 gradients overflowed: nothing was updated, the loss scale is smaller now


def train_step(
    model: nn.Module,
    engine: ShardedModel,
    optimizer: AdamW,
    objective: SupervisedTokens,
    microbatches: Sequence[Batch],
    *,
    lr_scale: float,
    max_grad_norm: float | None,
    scaler: LossScaler | None,
    recorder: Recorder,
) -> StepResult:
    """Forward, backward, update. All ranks give equally many microbatches.

    scaler: with fp16 on the wire (`Precision.needs_loss_scaling`), else None.

    Raises on all ranks alike, before anything is updated (with policy.step_in_backward: after): ValueError if there is
    nothing to predict; `NonFiniteError`; `LossScaleError`.
    """
    world = engine.world
    local_weight = sum(objective.weight(microbatch) for microbatch in microbatches)
    local_tokens = sum(microbatch.num_tokens for microbatch in microbatches)
    counts = sum_over_ranks(scalars([local_weight, local_tokens], world.device), world)
    scale = 1.0 if scaler is None else scaler.scale
    factor = torch.where(counts[0] > 0, scale / counts[0], 0.0)  # 0 is refused below: here the host would have to wait
    early = None
    if engine.policy.step_in_backward:
        early = _UpdateInBackward(engine, optimizer, lr_scale, microbatches, recorder)

    local_loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, microbatch in enumerate(microbatches, start=1):
        engine.expect_microbatch(is_last=number == len(microbatches))
        loss_sum = objective(model, microbatch.to(world.device)).loss_sum
        (loss_sum * factor.to(loss_sum.dtype)).backward()
        local_loss_sum += loss_sum.detach()
        del loss_sum  # and with it what is left of the graph, before the next forward makes another

    # Every replica has the same shards, so a sum over all ranks counts each square that often.
    squares = early.square_sum if early else local_square_sum(optimizer.shards, world.device)
    totals = sum_over_ranks(torch.stack([local_loss_sum, squares / engine.replica_world.size]), world)
    loss, square_sum, weight, tokens = torch.cat([totals, counts]).tolist()  # where the host waits, once a step
    if weight == 0:
        engine.weights_changed()
        engine.clear_gradients()
        raise ValueError("this step's examples have nothing to predict; the loss would be 0/0")
    norm = math.sqrt(square_sum) / scale if math.isfinite(square_sum) else math.inf
    was_skipped = scaler is not None and not math.isfinite(norm)
    result = StepResult(loss / weight, norm, weight, int(tokens), was_skipped)

    if scaler is not None:
        scaler.update(result.was_skipped)
    if not math.isfinite(result.loss) or not (math.isfinite(norm) or result.was_skipped):
        engine.weights_changed()  # those that were updated in backward
        engine.clear_gradients()
        raise NonFiniteError(f"loss {result.loss}, gradient norm {result.grad_norm}")
    if early is None and not result.was_skipped:
        with recorder.during("compute", "optimizer", ""):
            optimizer.step(lr_scale, grad_factor=clip_factor(norm, max_grad_norm) / scale)
    engine.weights_changed()
    engine.clear_gradients()
    return result


class _UpdateInBackward:
    """Updates every shard as soon as its gradient is complete, and adds up what the norm needs on the way."""

    def __init__(
        self,
        engine: ShardedModel,
        optimizer: AdamW,
        lr_scale: float,
        microbatches: Sequence[Batch],
        recorder: Recorder,
    ) -> None:
        if len(microbatches) > 1:
            raise ValueError(
                f"fsdp.step_in_backward updates after one microbatch, but this step has {len(microbatches)} of them; "
                "valid: loop.microbatch_tokens large enough for loop.examples_per_step in one"
            )
        self.square_sum: Tensor = torch.zeros((), dtype=torch.float64, device=engine.world.device)
        self._device = engine.world.device
        self._optimizer = optimizer
        self._recorder = recorder
        optimizer.begin_step(lr_scale)
        engine.update_in_backward(self._update)

    def _update(self, shard: FlatShard) -> None:
        with self._recorder.during("compute", "optimizer", shard.name):
            self.square_sum += local_square_sum([shard], self._device)
            self._optimizer.update(shard)
