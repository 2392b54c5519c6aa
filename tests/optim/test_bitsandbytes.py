"""Our states in bitsandbytes' AdamW8bit and theirs in ours. Oracle: the installed bitsandbytes."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from minift.optim.adamw import AdamW
from minift.optim.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

SHAPES = {"big": (70, 83), "exact": (16, 256), "small": (11, 13)}
CONFIG = OptimConfig(lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, no_decay=(), state="8bit")


def make_ours(weights: dict[str, torch.Tensor]) -> AdamW:
    """One shard for each parameter."""
    return AdamW(
        [
            FlatShard(
                name, w.flatten().clone(), torch.zeros(w.numel()), [ParamRange(name, 0, w.numel(), 0, SHAPES[name])]
            )
            for name, w in weights.items()
        ],
        CONFIG,
    )


def make_theirs(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.nn.Parameter], bitsandbytes.optim.AdamW8bit]:
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    theirs = bitsandbytes.optim.AdamW8bit(parameters.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    return parameters, theirs


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step_theirs(parameters, theirs, gradients) -> None:
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    theirs.step()


def step_ours(ours, gradients) -> None:
    for shard in ours.shards:
        shard.grad.copy_(gradients[shard.name].flatten())
    ours.step(1.0)


def assert_same_weights(ours, parameters) -> None:
    """One step from equal states: only the order of operations differs, some 20 roundings of updates below 10 lr."""
    for shard in ours.shards:
        theirs = parameters[shard.name].detach().flatten()
        assert ((shard.master - theirs).abs() <= 2**-24 * (20 * 0.1 + 4 * theirs.abs())).all(), shard.name


def test_their_states_continue_here() -> None:
    parameters, theirs = make_theirs(draw(0))
    for seed in (1, 2, 3):
        step_theirs(parameters, theirs, draw(seed))
    ours = make_ours({name: parameter.detach() for name, parameter in parameters.items()})
    for shard in ours.shards:
        state, num_steps = from_bitsandbytes(theirs.state[parameters[shard.name]])
        for what, tensor in state.items():
            ours.state_dict()[shard.name][what].copy_(tensor)
    ours.num_steps = num_steps
    step_ours(ours, draw(4))
    step_theirs(parameters, theirs, draw(4))
    assert_same_weights(ours, parameters)
    # The same moments up to what is near zero, where their CPU quantiser is coarser (see ops/blockwise.py).
    for shard in ours.shards:
        state, num_steps = from_bitsandbytes(theirs.state[parameters[shard.name]])
        for what, tensor in state.items():
            mine = ours.state_dict()[shard.name][what]
            if what.endswith("codes"):
                assert (mine.int() - tensor.int()).abs().float().mean() < 0.1, what
            else:
                torch.testing.assert_close(mine, tensor, rtol=2e-6, atol=1e-9)


def test_our_states_continue_there() -> None:
    ours = make_ours(draw(0))
    for seed in (1, 2, 3):
        step_ours(ours, draw(seed))
    parameters, theirs = make_theirs({s.name: s.master.view(SHAPES[s.name]) for s in ours.shards})
    step_theirs(parameters, theirs, {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    for shard in ours.shards:
        (piece,) = shard.ranges
        tensors = ours.state_dict()[shard.name]
        state = {what: tensors[what][p.start : p.stop] for what, p in ours.places(shard, piece).items()}
        converted = to_bitsandbytes(state, torch.Size(SHAPES[shard.name]), ours.num_steps)
        made_by_them = theirs.state[parameters[shard.name]]
        assert converted.keys() == made_by_them.keys()
        for key, tensor in converted.items():
            if key != "step":
                assert tensor.shape == made_by_them[key].shape and tensor.dtype == made_by_them[key].dtype, key
        back, num_steps = from_bitsandbytes(converted)
        assert num_steps == 3 and back.keys() == state.keys()
        assert all(torch.equal(back[what], state[what]) for what in state)
        theirs.state[parameters[shard.name]] = {
            key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in converted.items()
        }
        parameters[shard.name].data.copy_(shard.master.view(SHAPES[shard.name]))
    step_ours(ours, draw(4))
    step_theirs(parameters, theirs, draw(4))
    assert_same_weights(ours, parameters)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda s: s.pop("state1"), r"no \['state1'\]"),
        (lambda s: s.pop("state2"), r"no \['state2'\]"),
        (lambda s: s.pop("absmax2"), r"no \['absmax2'\]"),  # as without blocks
        (lambda s: s.update(qmap1=s["qmap2"]), "qmap1 is not the dynamic map"),
        (lambda s: s.update(absmax2=torch.zeros(3)), r"absmax2 has shape \(3,\) for 5810 elements; valid: \(23,\)"),
    ],
)
def test_other_states_are_refused(spoil, complaint) -> None:
    parameters, theirs = make_theirs(draw(0))
    step_theirs(parameters, theirs, draw(1))
    state = dict(theirs.state[parameters["big"]])
    spoil(state)
    with pytest.raises(ValueError, match=complaint):
        from_bitsandbytes(state)
