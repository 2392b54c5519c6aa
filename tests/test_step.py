"""One optimizer step of a real (tiny) model. Oracle: the same examples in one microbatch on one process, in fp32."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minift.data.batch import IGNORE, Batch
from minift.dist.collectives import barrier
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.objectives.sft import SupervisedTokens
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import LossScaler
from minift.precision import Precision
from minift.step import NonFiniteError, StepResult, train_step
from minift.trace import Recorder
from tests.ranks import run_ranks

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 1e4, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
NUM_DOCUMENTS, STEPS = 12, 3


def batch(documents: list[int], step: int) -> Batch:
    """These documents, packed; about half of the tokens are to be predicted."""
    tokens, targets, positions, bounds = [], [], [], [0]
    for document in documents:
        generator = torch.Generator().manual_seed(100 * step + document)
        length = 3 + document % 5
        ids = torch.randint(CONFIG["vocab_size"], (length + 1,), generator=generator)
        tokens.append(ids[:-1])
        targets.append(torch.where(torch.arange(length) % 2 == document % 2, ids[1:], IGNORE))
        positions.append(torch.arange(length))
        bounds.append(bounds[-1] + length)
    return Batch(
        torch.cat(tokens), torch.cat(positions), torch.tensor(bounds, dtype=torch.int32), 7, torch.cat(targets)
    )


def steps_on_rank(
    world: World, policy: ShardPolicy, precision: Precision, microbatches: int, first_scale: float | None = None
) -> tuple[list[StepResult], dict[str, Tensor], list[float]]:
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    recorder = Recorder(world.rank, world.device)
    engine = shard(model, model.shard_units(), world, policy, precision, recorder)
    max_grad_norm = None if policy.step_in_backward else 0.5
    optimizer = AdamW(engine.trainable_shards(), OptimConfig(lr=0.01, max_grad_norm=max_grad_norm))
    scaler = LossScaler(initial_scale=first_scale) if first_scale else None
    results, scales = [], []
    for step in range(STEPS):
        mine = list(range(NUM_DOCUMENTS))[world.rank :: world.size]
        results.append(
            train_step(
                model, engine, optimizer, SupervisedTokens(),
                [batch(mine[number::microbatches], step) for number in range(microbatches)],
                lr_scale=1.0, max_grad_norm=max_grad_norm, scaler=scaler, recorder=recorder,
            )
        )  # fmt: skip
        scales.append(scaler.scale if scaler else 1.0)
    return results, {name: tensor.cpu().clone() for name, tensor in engine.full_tensors()}, scales


FP32 = Precision(wire="float32")


@pytest.fixture(scope="module")
def expected() -> tuple[list[StepResult], dict[str, Tensor], list[float]]:
    return run_ranks(1, steps_on_rank, ShardPolicy(), FP32, 1)[0]


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    ("world_size", "policy"),
    [
        (2, ShardPolicy()),
        (3, ShardPolicy(strategy="zero2")),
        (2, ShardPolicy(strategy="zero1")),
        (3, ShardPolicy(strategy="ddp")),
        (4, ShardPolicy(replicas=2)),
        (4, ShardPolicy(strategy="zero2", replicas=2)),
        (2, ShardPolicy(offload=True)),
    ],
    ids=lambda value: f"{value.strategy}x{value.replicas}" if isinstance(value, ShardPolicy) else str(value),
)
def test_every_strategy_takes_the_same_steps(world_size: int, policy: ShardPolicy, microbatches: int, expected) -> None:
    """Losses and norms to 1e-5: fp32 sums in another order, through Adam, which turns ulps of tiny gradients into
    more.
    """
    for results, weights, _ in run_ranks(world_size, steps_on_rank, policy, FP32, microbatches):
        for ours, theirs in zip(results, expected[0], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert (ours.weight, ours.tokens, ours.was_skipped) == (theirs.weight, theirs.tokens, False)
        for name, weight in weights.items():
            assert float((weight - expected[1][name]).abs().median()) < 1e-6, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_updating_in_backward(world_size: int) -> None:
    """The same losses and norms as updating afterwards without clipping."""
    early = run_ranks(world_size, steps_on_rank, ShardPolicy(step_in_backward=True), FP32, 1)[0][0]
    late = run_ranks(1, steps_without_clipping)[0]
    for ours, theirs in zip(early, late, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


def nothing_to_predict(world: World, has_nothing: bool, policy: ShardPolicy) -> tuple[str, bool, float]:
    """What a step says in which nobody has anything to predict, or only rank 0 has not; whether weights are as they
    were; the loss of the step after it."""
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    recorder = Recorder(world.rank, world.device)
    engine = shard(model, model.shard_units(), world, policy, FP32, recorder)
    max_grad_norm = None if policy.step_in_backward else 1.0
    optimizer = AdamW(engine.trainable_shards(), OptimConfig(lr=0.01, weight_decay=0.0, max_grad_norm=max_grad_norm))

    def step(microbatch: Batch) -> StepResult:
        return train_step(
            model, engine, optimizer, SupervisedTokens(), [microbatch],
            lr_scale=1.0, max_grad_norm=max_grad_norm, scaler=None, recorder=recorder,
        )  # fmt: skip

    def weights() -> dict[str, Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in engine.full_tensors()}

    whole = batch([0, 1, 2], 0)
    empty = replace(whole, targets_T=torch.full_like(whole.targets_T, IGNORE))
    before, said = weights(), ""
    try:
        step(empty if has_nothing or world.rank == 0 else whole)
    except ValueError as error:
        said = str(error)
    is_unchanged = all(torch.equal(before[name], weight) for name, weight in weights().items())
    return said, is_unchanged, step(whole).loss


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_with_nothing_to_predict_is_refused_and_changes_nothing(world_size: int, early: bool) -> None:
    """Updates in backward are made, with gradients of zero: but for weight decay, which is none here."""
    policy = ShardPolicy(step_in_backward=early)
    for said, is_unchanged, loss in run_ranks(world_size, nothing_to_predict, True, policy):
        assert "nothing to predict" in said and is_unchanged and math.isfinite(loss)


def test_a_rank_may_have_nothing_to_predict() -> None:
    for said, is_unchanged, loss in run_ranks(2, nothing_to_predict, False, ShardPolicy()):
        assert said == "" and not is_unchanged and math.isfinite(loss)


def steps_without_clipping(world: World) -> list[StepResult]:
    """step_in_backward off, max_grad_norm None."""
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    recorder = Recorder(world.rank, world.device)
    engine = shard(model, model.shard_units(), world, ShardPolicy(), FP32, recorder)
    optimizer = AdamW(engine.trainable_shards(), OptimConfig(lr=0.01, max_grad_norm=None))
    return [
        train_step(
            model, engine, optimizer, SupervisedTokens(), [batch(list(range(NUM_DOCUMENTS)), step)],
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=recorder,
        )
        for step in range(STEPS)
    ]  # fmt: skip


def too_many_microbatches(world: World) -> str:
    with pytest.raises(ValueError) as caught:
        steps_on_rank(world, ShardPolicy(step_in_backward=True), FP32, 2)
    return str(caught.value)


def test_updating_in_backward_needs_one_microbatch() -> None:
    assert "has 2 of them" in run_ranks(1, too_many_microbatches)[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp16_skips_what_overflows_and_goes_on(world_size: int, expected) -> None:
    """A first scale of 2^24 overflows fp16: the step is skipped on all ranks, the scale halves. fp16 has 11 bits, so
    losses of the steps that were taken agree with fp32 to 1 %.
    """
    precision = Precision(wire="float16")
    results, _, scales = run_ranks(world_size, steps_on_rank, ShardPolicy(), precision, 1, 2.0**24)[0]
    assert results[0].was_skipped and not math.isfinite(results[0].grad_norm)
    assert scales[0] == 2.0**23
    assert results[0].loss == pytest.approx(expected[0][0].loss, rel=1e-2)
    taken, _, scales = run_ranks(world_size, steps_on_rank, ShardPolicy(), precision, 1, 2.0**8)[0]
    assert scales == [2.0**8] * STEPS
    for ours, theirs in zip(taken, expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-2)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)


def infinite_loss(world: World) -> None:
    """NaN in a weight of one rank's shard: all ranks stop, whatever the scaler."""
    for precision, scaler in ((FP32, None), (Precision(wire="float16"), LossScaler())):
        model = CausalLM(ModelConfig.from_hf(CONFIG))
        model.init_weights(seed=3)
        recorder = Recorder(world.rank, world.device)
        engine = shard(model, model.shard_units(), world, ShardPolicy(), precision, recorder)
        if world.rank == 0:
            engine.trainable_shards()[1].master[0] = math.nan
        optimizer = AdamW(engine.trainable_shards(), OptimConfig(lr=0.01))
        with pytest.raises(NonFiniteError):
            train_step(
                model, engine, optimizer, SupervisedTokens(), [batch([world.rank], 0)],
                lr_scale=1.0, max_grad_norm=1.0, scaler=scaler, recorder=recorder,
            )  # fmt: skip
        assert optimizer.num_steps == 0


def test_a_loss_that_is_no_number_stops_all_ranks() -> None:
    run_ranks(2, infinite_loss)


def restored_after_a_failure(world: World) -> tuple[float, float]:
    """The loss before a step that fails when backward has updated weights, and after those have been written back."""
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    recorder, policy = Recorder(world.rank, world.device), ShardPolicy(strategy="zero2", step_in_backward=True)
    engine = shard(model, model.shard_units(), world, policy, Precision(), recorder)
    optimizer = AdamW(engine.trainable_shards(), OptimConfig(lr=0.01, max_grad_norm=None))
    initial = [flat_shard.weights().clone() for flat_shard in optimizer.shards]

    def loss() -> float:
        with torch.no_grad():
            return float(SupervisedTokens()(model, batch([world.rank], 0).to(world.device)).loss_sum)

    before = loss()
    barrier(world)  # before anybody writes what others may still be reading
    for flat_shard, values in zip(optimizer.shards, initial, strict=True):
        flat_shard.set_weights(torch.full_like(values, math.nan))
    engine.weights_changed()
    with pytest.raises(NonFiniteError):
        train_step(
            model, engine, optimizer, SupervisedTokens(), [batch([world.rank], 0)],
            lr_scale=1.0, max_grad_norm=None, scaler=None, recorder=recorder,
        )  # fmt: skip
    for flat_shard, values in zip(optimizer.shards, initial, strict=True):
        flat_shard.set_weights(values)
    engine.weights_changed()
    return before, loss()


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_a_failed_step_updated_can_be_written_back(world_size: int) -> None:
    for before, after in run_ranks(world_size, restored_after_a_failure):
        assert before == after


def cleared_before_backward(world: World, strategy: str) -> str:
    model = CausalLM(ModelConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    engine = shard(model, model.shard_units(), world, ShardPolicy(strategy=strategy), FP32)
    losses = [SupervisedTokens()(model, batch([world.rank], 0).to(world.device)).loss_sum]
    engine.clear_gradients()
    losses.append(SupervisedTokens()(model, batch([world.rank], 1).to(world.device)).loss_sum)
    with pytest.raises(RuntimeError) as caught:
        losses[0].backward()  # the head's memory is that of the second loss now
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["zero3", "ddp"])
def test_a_head_gradient_that_was_overwritten_is_not_taken_for_another(strategy: str) -> None:
    for message in run_ranks(2, cleared_before_backward, strategy):
        assert "the gradient of the LM head, computed in forward, is gone" in message
