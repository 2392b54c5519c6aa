"""Steps whose update is launched and then refused or skipped. Oracle: the same run without such a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minift.data.batch import IGNORE, Batch
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.sft import LossSum, SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import MAX_SCALE, MIN_SCALE, LossScaleError, LossScaler
from minift.precision import Precision
from minift.step import NonFiniteError, StepResult, grad_factor, train_step
from minift.trace import Recorder
from tests.ranks import DEVICE, run_ranks
from tests.test_step import CONFIG, batch

# Matrices of 64 x 64 have moments in 8 bits where norms have them in fp32.
MODEL = CONFIG | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SETUPS = {
    "fp32": (Precision(wire="float32"), OptimConfig(lr=0.01)),
    "bf16 masters, paged 8-bit moments": (
        Precision(master="bfloat16", stochastic_rounding=True),
        OptimConfig(lr=0.01, state="8bit", paged=True),
    ),
    "bf16": (Precision(), OptimConfig(lr=0.01, paged=True)),
    "fp16": (Precision(wire="float16"), OptimConfig(lr=0.01, state="8bit")),
}


class Spoiled(SupervisedTokens):
    """With something added to the loss, which its gradient does not see, and with this many times the gradient."""

    def __init__(self, loss: float = 0.0, gradient: float = 1.0) -> None:
        super().__init__()
        self.loss, self.gradient = loss, gradient

    def __call__(self, model, batch) -> LossSum:
        result = super().__call__(model, batch)
        result.loss_sum.register_hook(lambda gradient: gradient * self.gradient)
        return replace(result, loss_sum=result.loss_sum + self.loss)


class Run:
    """A tiny model in training. seen: names of the shards that were about to be updated."""

    def __init__(self, world: World, setup: str, policy: ShardPolicy, scale: float) -> None:
        precision, optim = SETUPS[setup]
        self.recorder = Recorder(world.rank, world.device)
        self.model = CausalLM(ModelConfig.from_hf(MODEL))
        self.model.init_weights(seed=3)
        self.engine = shard(self.model, self.model.shard_units(), world, policy, precision, self.recorder)
        self.optimizer = AdamW(self.engine.trainable_shards(), optim)
        self.scaler = LossScaler(initial_scale=scale) if precision.needs_loss_scaling else None
        for flat_shard in self.optimizer.shards:
            weights = flat_shard.weights().clone()
            weights[::7] = -0.0
            flat_shard.set_weights(weights)
        self.engine.weights_changed()
        self.seen: list[str] = []
        self.optimizer.before_update = lambda flat_shard: self.seen.append(flat_shard.name)

    def step(self, microbatch: Batch, objective: SupervisedTokens) -> StepResult:
        return train_step(
            self.model, self.engine, self.optimizer, objective, [microbatch],
            lr_scale=1.0, max_grad_norm=0.5, scaler=self.scaler, recorder=self.recorder,
        )  # fmt: skip

    def bits(self) -> list[Tensor]:
        """Of all masters and moments."""
        state = self.optimizer.state_dict()
        tensors = [t for s in self.optimizer.shards for t in (*s.halves().values(), *state[s.name].values())]
        return [tensor.view(torch.uint8).cpu().clone() for tensor in tensors]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


REFUSED = {
    "nothing to predict": (ValueError, SupervisedTokens()),
    "the loss is NaN": (NonFiniteError, Spoiled(loss=math.nan)),
    "the loss is infinite": (NonFiniteError, Spoiled(loss=math.inf)),
    "the gradient is NaN": (NonFiniteError, Spoiled(gradient=math.nan)),
    "the gradient's norm overflows": (NonFiniteError, Spoiled(gradient=1e30)),
}


def with_and_without(world: World, setup: str, policy: ShardPolicy, reason: str, scale: float) -> None:
    """A run of two steps with a refused or skipped one between them, and one without it."""
    error, objective = REFUSED[reason]
    if world.rank != 0:  # one rank's trouble is everybody's
        objective = SupervisedTokens()
    ours, expected = (Run(world, setup, policy, scale) for _ in range(2))
    for run in (ours, expected):
        run.step(batch([world.rank, 2], 0), SupervisedTokens())
    before = ours.bits()
    ours.seen.clear()
    refused = batch([world.rank], 1)
    if reason == "nothing to predict":
        refused = replace(refused, targets_T=torch.full_like(refused.targets_T, IGNORE))
    skips = ours.scaler is not None and "gradient" in reason
    if skips and scale > MIN_SCALE:
        result = ours.step(refused, objective)
        assert result.was_skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    else:
        with pytest.raises(LossScaleError if skips else error):
            ours.step(refused, objective)
    assert ours.seen == [flat_shard.name for flat_shard in ours.optimizer.shards]  # it was launched
    assert same(before, ours.bits())
    assert ours.optimizer.num_steps == 1
    if ours.scaler is not None:
        expected.scaler.load_state_dict(ours.scaler.state_dict())
    losses = [run.step(batch([world.rank, 3], 2), SupervisedTokens()).loss for run in (ours, expected)]
    assert losses[0] == losses[1]
    assert ours.optimizer.num_steps == expected.optimizer.num_steps == 2
    assert same(ours.bits(), expected.bits()) and not same(before, ours.bits())


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("setup", ["fp32", "bf16 masters, paged 8-bit moments"])
def test_a_refused_step_leaves_every_bit_and_the_next_is_as_if_it_had_not_been(setup: str, reason: str) -> None:
    run_ranks(2, with_and_without, setup, ShardPolicy(), reason, 1.0)


@pytest.mark.parametrize(
    ("world_size", "policy"),
    [(1, ShardPolicy()), (2, ShardPolicy(strategy="ddp")), (2, ShardPolicy(strategy="zero1")),
     (2, ShardPolicy(replicas=2)), (2, ShardPolicy(offload=True))],
)  # fmt: skip
@pytest.mark.parametrize("reason", ["nothing to predict", "the gradient is NaN"])
def test_with_every_strategy(world_size: int, policy: ShardPolicy, reason: str) -> None:
    run_ranks(world_size, with_and_without, "bf16", policy, reason, 1.0)


@pytest.mark.parametrize(
    ("reason", "scale"),
    [("the gradient's norm overflows", 2.0**4), ("the gradient is NaN", MIN_SCALE), ("the loss is NaN", 2.0**4)],
)
def test_with_a_loss_scale(reason: str, scale: float) -> None:
    """Skipped, refused as the scale is the smallest, refused."""
    run_ranks(2, with_and_without, "fp16", ShardPolicy(), reason, scale)


# ------------------------------------------------------------------------------------------- the factor of the update

numbers = st.one_of(st.floats(), st.floats(0.0, 1e3), st.sampled_from([math.nan, math.inf]))
scales = st.integers(round(math.log2(MIN_SCALE)), round(math.log2(MAX_SCALE))).map(lambda exponent: 2.0**exponent)


@given(numbers, numbers.map(abs), st.one_of(st.none(), st.floats(0.0, exclude_min=True, allow_infinity=False)), scales)
def test_the_factor_has_the_bits_of_the_formula_or_is_nan(
    loss: float, norm: float, max_norm: float | None, scale: float
) -> None:
    """Computed by Python's floats, which are fp64, and rounded to fp32 once."""
    on_device = [torch.full((), value, dtype=torch.float64, device=DEVICE) for value in (loss, norm)]
    factor = grad_factor(*on_device, max_norm, scale).cpu()
    if math.isfinite(loss) and math.isfinite(norm):
        clipping = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        expected = torch.full((), clipping / scale, dtype=torch.float32)
        assert torch.equal(factor.view(torch.int32), expected.view(torch.int32))
    else:
        assert factor.dtype == torch.float32 and factor.isnan()
