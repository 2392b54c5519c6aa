"""Oracle: `torch.amp.GradScaler`, on sequences of steps of which some overflow, and on a problem computed in fp16."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.loss_scaler import MAX_SCALE, MIN_SCALE, LossScaleError, LossScaler
from minift.optim.shard import FlatShard, ParamRange

settings = st.fixed_dictionaries(
    {
        "growth_factor": st.sampled_from([2.0, 4.0]),
        "backoff_factor": st.sampled_from([0.5, 0.25]),
        "growth_interval": st.integers(1, 4),
    }
)
# 12 overflows of 2^-2 each stay above MIN_SCALE, 20 growths of 2^2 below MAX_SCALE.
overflows = st.lists(st.booleans(), max_size=20).filter(lambda steps: sum(steps) <= 12)


@given(settings, overflows)
def test_scales_and_skips_as_torch_does(settings, overflows):
    ours, theirs = LossScaler(2.0**16, **settings), torch.amp.GradScaler("cpu", init_scale=2.0**16, **settings)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for overflowed in overflows:
        theirs.scale(torch.zeros(()))  # it makes its tensors when it is first used
        weight.grad = torch.tensor([float("inf") if overflowed else theirs.get_scale()])
        before = weight.item()
        theirs.step(optimizer)
        theirs.update()
        assert (weight.item() == before) == overflowed
        ours.update(overflowed)
        assert ours.scale == theirs.get_scale()
        assert ours.state_dict()["good_steps"] == theirs.state_dict()["_growth_tracker"]


SIZE, STEPS = 12, 14


@given(st.integers(0, 2**31), st.sampled_from([2.0**10, 2.0**16, 2.0**20]), st.integers(1, 3))
def test_trains_in_fp16_as_torch_does(seed, initial_scale, growth_interval):
    """Least squares on inputs of such size that the gradients of some steps overflow and those of others do not."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SIZE, generator=generator)
    batches = torch.randn(STEPS, 8, SIZE, generator=generator) * 4.0 ** torch.randint(
        -3, 3, (STEPS, 1, 1), generator=generator
    )
    config = OptimConfig(lr=1e-2, weight_decay=0.1)

    def loss_of(master: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs.half() @ master.half()).float().square().mean()  # the gradient of the product is in fp16

    whole = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([whole], lr=1e-2, weight_decay=0.1, foreach=False)
    theirs = torch.amp.GradScaler("cpu", init_scale=initial_scale, growth_interval=growth_interval)
    expected, expected_scales = [], []
    for inputs in batches:
        whole.grad = None
        theirs.scale(loss_of(whole, inputs)).backward()
        theirs.step(optimizer)
        theirs.update()
        expected.append(whole.detach().clone())
        expected_scales.append(theirs.get_scale())

    shard = FlatShard("s", start.clone(), torch.zeros(SIZE), [ParamRange("w", 0, SIZE, 0, (SIZE,))])
    adamw, ours = AdamW([shard], config), LossScaler(initial_scale, growth_interval=growth_interval)
    for inputs, weights, scale in zip(batches, expected, expected_scales, strict=True):
        master = shard.master.detach().requires_grad_()
        (loss_of(master, inputs) * ours.scale).backward()
        shard.grad.copy_(master.grad)
        overflowed = not shard.grad.norm().isfinite()
        before = shard.master.clone()
        if not overflowed:
            adamw.step(1.0, grad_factor=1.0 / ours.scale)
        ours.update(bool(overflowed))
        assert ours.scale == scale
        assert torch.equal(shard.master, before) == overflowed
        # Per step |update| <= 10 lr (first steps of Adam: at most lr / (1 - b1)), off by 8 roundings of it on either
        # side, plus two of the weight. The gradient is that of fp16 weights, which may round to another neighbour by
        # this much: a relative change of 2^-10 in inputs, so of the update, in a step. Ten steps of that at most.
        assert ((shard.master - weights).abs() <= STEPS * (2**-10 * 10 * config.lr + 2**-22 * 4)).all()


def test_overflow_at_the_smallest_scale_is_an_error_that_names_it():
    scaler = LossScaler(2.0**16)
    scaler.update(False)
    for _ in range(26):  # 2^16 to 2^-10
        scaler.update(True)
    assert scaler.scale == MIN_SCALE
    with pytest.raises(LossScaleError, match=r"smallest loss scale, 0\.000976562, after 27 skipped steps in a row"):
        scaler.update(True)


def test_a_step_in_between_starts_the_count_of_skipped_steps_again():
    scaler = LossScaler(2 * MIN_SCALE)
    scaler.update(True)
    scaler.update(False)
    with pytest.raises(LossScaleError, match="after 1 skipped"):
        scaler.update(True)


def test_the_scale_stays_within_its_bounds():
    scaler = LossScaler(MAX_SCALE / 2, growth_factor=4.0, backoff_factor=2.0**-80, growth_interval=1)
    scaler.update(False)
    scaler.update(False)
    assert scaler.scale == MAX_SCALE
    assert torch.tensor(1 / scaler.scale).item() == 2.0**-64  # a normal fp32 number
    scaler.update(True)
    assert scaler.scale == MIN_SCALE


@given(settings, overflows, st.integers(0, 20))
def test_resumes_from_json(settings, overflows, stop):
    straight, first, second = (LossScaler(2.0**16, **settings) for _ in range(3))
    for overflowed in overflows:
        straight.update(overflowed)
    for overflowed in overflows[:stop]:
        first.update(overflowed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for overflowed in overflows[stop:]:
        second.update(overflowed)
    assert second.state_dict() == straight.state_dict()


def test_a_shorter_growth_interval_after_resuming_still_grows():
    before, after = LossScaler(growth_interval=10), LossScaler(growth_interval=3)
    for _ in range(8):
        before.update(False)
    after.load_state_dict(before.state_dict())
    after.update(False)
    assert after.scale == 2 * before.scale


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"scale": 3.0}, "scale 3.0; valid: a power of two"),
        ({"scale": 2.0**70}, "scale 1.18"),
        ({"scale": float("nan")}, "scale nan"),
        ({"good_steps": -1}, "good_steps -1"),
        ({"skipped_steps": 1.5}, "skipped_steps 1.5"),
        ({"other": 1}, r"valid: exactly \['good_steps', 'scale', 'skipped_steps'\]"),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(change, complaint):
    scaler = LossScaler()
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=complaint):
        scaler.load_state_dict({**before, **change})
    assert scaler.state_dict() == before


@pytest.mark.parametrize(
    "field, value",
    [
        ("initial_scale", 1000.0),
        ("initial_scale", 0.0),
        ("initial_scale", float("inf")),
        ("growth_factor", 1.0),
        ("growth_factor", 1.5),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.3),
        ("growth_interval", 0),
    ],
)
def test_an_invalid_argument_is_named_with_its_value_and_what_is_valid(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}; valid: \w+"):
        LossScaler(**{field: value})
