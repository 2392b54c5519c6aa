"""One optimizer step: the same for every objective, strategy and number format.

The loss is a sum, divided once by the weight of the whole step over all ranks and microbatches, which is known before
the first backward. So a step is the same however its examples are spread.

The host waits once, for loss and norm, and by then the device has all of the step: update kernels read from its memory
what they multiply gradients with, and write nothing where the host is going to refuse or skip the step (`grad_factor`).

Not here: the loop (`train`), when what is communicated (`fsdp`), the schedule (`optim`).
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

    Raises on all ranks alike, with weights, moments and the count of steps as they were (policy.step_in_backward: as
    the update left them): ValueError if there is nothing to predict; `NonFiniteError`; `LossScaleError`.
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
    mean_loss, square_sum = totals[0] / counts[0], totals[1]
    report = _ToHost(torch.stack([mean_loss, square_sum, *counts]))
    if early is None:
        with recorder.during("compute", "optimizer", ""):
            optimizer.step(lr_scale, grad_factor(mean_loss, square_sum.sqrt() / scale, max_grad_norm, scale))

    loss, squares_on_host, weight, tokens = report.wait()
    # The root again: that of MKL, which PyTorch takes on a processor, may be off by one in the last of fp64's bits.
    norm = math.sqrt(squares_on_host) / scale if math.isfinite(squares_on_host) else math.inf
    if early is None and not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.take_back_step()
    engine.weights_changed()
    engine.clear_gradients()
    if weight == 0:
        raise ValueError("this step's examples have nothing to predict; the loss would be 0/0")
    was_skipped = scaler is not None and not math.isfinite(norm)
    if scaler is not None:
        scaler.update(was_skipped)
    if not math.isfinite(loss) or not (math.isfinite(norm) or was_skipped):
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
    return StepResult(loss, norm, weight, int(tokens), was_skipped)


def grad_factor(loss: Tensor, norm: Tensor, max_norm: float | None, scale: float) -> Tensor:
    """What the update multiplies gradients with: clipping and 1 / scale; NaN, and nothing is updated, unless loss and
    norm are finite (without anything to predict the loss is 0/0).

    loss, norm: 0-dim fp64. scale: a power of two, by which every device divides exactly. Returns 0-dim fp32.
    """
    return (clip_factor(norm, max_norm) / scale + 0.0 * loss + 0.0 * norm).float()


class _ToHost:
    """Values on their way to the host, which waits for them and not for what the device is given to do after them."""

    def __init__(self, values: Tensor) -> None:
        self._copy = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def wait(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


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
