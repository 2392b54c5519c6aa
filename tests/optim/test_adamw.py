"""Oracle: torch.optim.AdamW (single-tensor) on whole parameters. Where the flat weights are cut may change no bit.

bf16 masters are held to the fp32 ones; what many steps make of them is in test_bf16_masters.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange

SIZES = {"a.weight": 37, "a.norm.weight": 5, "b.lora_A.weight": 21, "b.lora_B.weight": 18, "b.bias": 3}
TOTAL = sum(SIZES.values())
CONFIG = OptimConfig(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, lr_ratios={"lora_B": 16.0})
SCALES = [0.0, 0.5, 1.0, 0.75, 0.25]  # of the learning rate, step by step

cuts = st.lists(st.integers(0, TOTAL), max_size=2).map(lambda inner: [0, *sorted(inner), TOTAL])
seeds = st.integers(0, 2**31)
masters = st.sampled_from([torch.float32, torch.bfloat16])


def make_shards(flat, borders, in_halves=False):
    """Cut flat weights (fp32 or bf16) into shards at `borders`; a parameter may end up in several of them."""
    starts, at = {}, 0
    for name, size in SIZES.items():
        starts[name], at = at, at + size
    shards = []
    for index, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        ranges = []
        for name, size in SIZES.items():
            low, high = max(begin, starts[name]), min(end, starts[name] + size)
            if low < high:
                ranges.append(ParamRange(name, low - begin, high - begin, low - starts[name], (size,)))
        master, grad = flat[begin:end].clone(), torch.zeros(end - begin)
        if in_halves:
            upper, lower = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
            shards.append(FlatShard(f"shard{index}", upper, grad, ranges, lower))
            shards[-1].set_weights(master)
        else:
            shards.append(FlatShard(f"shard{index}", master, grad, ranges))
    return shards


def make_problem(seed):
    """Initial weights and one gradient per step, of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(TOTAL, generator=generator)
    gradients = torch.randn(len(SCALES), TOTAL, generator=generator)
    return weights, gradients * 10.0 ** torch.randint(-6, 2, (len(SCALES), TOTAL), generator=generator)


def run(optimizer, gradients, scales, borders, grad_factor=1.0):
    for gradient, scale in zip(gradients, scales, strict=True):
        for shard, begin, end in zip(optimizer.shards, borders, borders[1:], strict=False):
            shard.grad.add_(gradient[begin:end])
        optimizer.step(scale, grad_factor)
        for shard in optimizer.shards:
            shard.grad.zero_()


def flatten(optimizer):
    """(3, TOTAL): weights and both moments, in fp32."""
    state = optimizer.state_dict()
    pick = [[shard.weights().float(), *state[shard.name].values()] for shard in optimizer.shards]
    return torch.stack([torch.cat(column) for column in zip(*pick, strict=True)])


@given(seeds, st.integers(0, TOTAL))
def test_masters_in_halves_get_the_same_bits(seed, border):
    weights, gradients = make_problem(seed)
    borders = [0, border, TOTAL]
    whole, halves = (AdamW(make_shards(weights, borders, in_halves), CONFIG) for in_halves in (False, True))
    assert [len(pieces) for pieces in whole._segments.values()] == [len(pieces) for pieces in halves._segments.values()]
    for optimizer in (whole, halves):
        run(optimizer, gradients, SCALES, borders)
    assert torch.equal(flatten(halves), flatten(whole))


@given(seeds)
def test_equals_torch_adamw_on_whole_parameters(seed):
    weights, gradients = make_problem(seed)
    ours = AdamW(make_shards(weights, [0, 50, TOTAL]), CONFIG)
    run(ours, gradients, SCALES, [0, 50, TOTAL])

    whole = [torch.nn.Parameter(piece.clone()) for piece in weights.split(list(SIZES.values()))]
    groups = [
        {"params": [p], "weight_decay": 0.0 if "norm" in n or "bias" in n else 0.1, "ratio": 16.0 if "_B" in n else 1.0}
        for n, p in zip(SIZES, whole, strict=True)
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for gradient, scale in zip(gradients, SCALES, strict=True):
        for group, piece in zip(theirs.param_groups, gradient.split(list(SIZES.values())), strict=True):
            group["params"][0].grad, group["lr"] = piece.clone(), 1e-2 * scale * group["ratio"]
        theirs.step()

    master, exp_avg, exp_avg_sq = flatten(ours)
    # With u = 2^-24 and G the largest gradient of an element so far: in each step either side rounds m at most thrice,
    # by u G or (the difference in torch's lerp) 2 u G, and v, a sum of positive terms, thrice by u v.
    u, steps = 2**-24, len(SCALES)
    largest = gradients.abs().amax(0)
    assert ((exp_avg - torch.cat([theirs.state[p]["exp_avg"] for p in whole])).abs() <= steps * 6 * u * largest).all()
    assert ((exp_avg_sq / torch.cat([theirs.state[p]["exp_avg_sq"] for p in whole]) - 1).abs() <= steps * 6 * u).all()
    # With the step size, an error of 6 u G a step in m is at most 6 u G / (1 - b1) of lr, and G is at most 5 times the
    # square root of v (b2^4 (1 - b2) G^2 <= v). Everything after that: at most 8 roundings of the update on either
    # side (it is below 16 lr * 5), and two of the weight by half an ulp.
    expected = torch.cat([p.detach() for p in whole])
    bound = steps * u * (16 * 1e-2 * 5 * (6 / 0.2 + 16) + 4 * (expected.abs() + 1))
    assert ((master - expected).abs() <= bound).all()


@given(seeds, cuts, masters)
def test_where_the_shards_are_cut_changes_no_bit(seed, borders, master_dtype):
    weights, gradients = make_problem(seed)
    weights = weights.to(master_dtype)
    together, apart = AdamW(make_shards(weights, [0, TOTAL]), CONFIG), AdamW(make_shards(weights, borders), CONFIG)
    run(together, gradients, SCALES, [0, TOTAL])
    run(apart, gradients, SCALES, borders)
    assert torch.equal(flatten(together), flatten(apart))


def test_equal_parameters_are_one_segment_and_padding_stays_zero():
    """Ranges as FSDP makes them: aligned, so with gaps."""
    ranges = [ParamRange(f"layer.{i}.weight", 16 * i, 16 * i + 9, 0, (9,)) for i in range(4)]
    shard = FlatShard("s", torch.zeros(64), torch.zeros(64), ranges)
    for piece in ranges:
        shard.master[piece.start : piece.stop] = shard.grad[piece.start : piece.stop] = 1.0
    optimizer = AdamW([shard], CONFIG)
    assert len(optimizer._segments["s"]) == 1
    optimizer.step(1.0)
    assert torch.equal(shard.master.view(4, 16)[:, 9:], torch.zeros(4, 7))
    assert (shard.master.view(4, 16)[:, :9] < 1.0).all()


def test_ratio_zero_freezes():
    weights, gradients = make_problem(0)
    optimizer = AdamW(make_shards(weights, [0, TOTAL]), OptimConfig(weight_decay=0.1, lr_ratios={"lora_A": 0.0}))
    run(optimizer, gradients, SCALES, [0, TOTAL])
    moved = flatten(optimizer)[0] != weights
    piece = optimizer.shards[0].ranges[2]
    assert piece.name == "b.lora_A.weight"
    assert not moved[piece.start : piece.stop].any() and moved[: piece.start].all() and moved[piece.stop :].all()


@given(seeds, st.integers(0, len(SCALES)), masters)
def test_resume_continues_bit_for_bit(seed, stop, master_dtype):
    weights, gradients = make_problem(seed)
    weights = weights.to(master_dtype)
    borders = [0, 30, TOTAL]
    straight = AdamW(make_shards(weights, borders), CONFIG)
    run(straight, gradients, SCALES, borders)

    first = AdamW(make_shards(weights, borders), CONFIG)
    run(first, gradients[:stop], SCALES[:stop], borders)
    second = AdamW(make_shards(flatten(first)[0].to(master_dtype), borders), CONFIG)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, gradients[stop:], SCALES[stop:], borders)
    assert torch.equal(flatten(straight), flatten(second))


@given(seeds, st.sampled_from([2.0**-16, 0.37, 3.0]), st.booleans())
def test_grad_factor_is_a_multiplication_of_the_gradients(seed, factor, as_tensor):
    weights, gradients = make_problem(seed)
    factor = torch.tensor(factor)
    expected, ours = (AdamW(make_shards(weights, [0, 30, TOTAL]), CONFIG) for _ in range(2))
    run(expected, gradients * factor, SCALES, [0, 30, TOTAL])
    run(ours, gradients, SCALES, [0, 30, TOTAL], grad_factor=factor if as_tensor else factor.item())
    assert torch.equal(flatten(expected), flatten(ours))


@given(seeds, masters, st.permutations(range(3)))
def test_shards_updated_one_by_one_in_any_order_get_the_same_bits(seed, master_dtype, order):
    weights, gradients = make_problem(seed)
    borders = [0, 20, 60, TOTAL]
    together, apart = (AdamW(make_shards(weights.to(master_dtype), borders), CONFIG) for _ in range(2))
    run(together, gradients, SCALES, borders, grad_factor=0.5)
    for gradient, scale in zip(gradients, SCALES, strict=True):
        apart.begin_step(scale)
        for index in order:
            shard = apart.shards[index]
            shard.grad.copy_(gradient[borders[index] : borders[index + 1]])
            apart.update(shard, grad_factor=torch.tensor(0.5))
    assert apart.num_steps == together.num_steps and torch.equal(flatten(together), flatten(apart))


@given(seeds, masters, st.integers(0, len(SCALES)), st.sampled_from([float("nan"), float("inf")]), st.booleans())
def test_a_step_that_wrote_nothing_is_taken_back(seed, master_dtype, at, factor, as_tensor):
    """Wherever it comes, steps after it are as if it had not been."""
    weights, gradients = make_problem(seed)
    borders = [0, 30, TOTAL]
    expected, ours = (AdamW(make_shards(weights.to(master_dtype), borders), CONFIG) for _ in range(2))
    run(ours, gradients[:at], SCALES[:at], borders)
    before = flatten(ours)
    run(ours, gradients[:1], [1.0], borders, grad_factor=torch.tensor(factor) if as_tensor else factor)
    ours.take_back_step()
    assert ours.num_steps == at and torch.equal(flatten(ours), before)
    run(ours, gradients[at:], SCALES[at:], borders)
    run(expected, gradients, SCALES, borders)
    assert ours.num_steps == expected.num_steps and torch.equal(flatten(ours), flatten(expected))


def test_a_step_is_taken_back_when_all_of_it_was_given_away():
    optimizer = AdamW(make_shards(make_problem(0)[0], [0, 30, TOTAL]), CONFIG)
    optimizer.begin_step(1.0)
    optimizer.update(optimizer.shards[0])
    with pytest.raises(AssertionError, match="has not updated .*shard1"):
        optimizer.take_back_step()


def test_before_update_sees_every_shard_as_it_was():
    weights, gradients = make_problem(0)
    optimizer = AdamW(make_shards(weights, [0, 30, TOTAL]), CONFIG)
    run(optimizer, gradients[:1], [1.0], [0, 30, TOTAL])
    before, seen = flatten(optimizer), []

    def fence(shard):
        state = optimizer.state_dict()[shard.name]
        seen.append((shard.name, torch.stack([shard.master, state["exp_avg"], state["exp_avg_sq"]])))

    optimizer.before_update = fence
    run(optimizer, gradients[1:2], [1.0], [0, 30, TOTAL])
    assert [name for name, _ in seen] == ["shard0", "shard1"]
    assert torch.equal(torch.cat([values for _, values in seen], dim=1), before)
    assert not torch.equal(flatten(optimizer), before)


def test_an_update_needs_a_step_that_has_begun_and_comes_once():
    weights, _ = make_problem(0)
    optimizer = AdamW(make_shards(weights, [0, 30, TOTAL]), CONFIG)
    with pytest.raises(AssertionError, match="shard0.*before begin_step"):
        optimizer.update(optimizer.shards[0])
    optimizer.begin_step(1.0)
    optimizer.update(optimizer.shards[0])
    with pytest.raises(AssertionError, match="shard0: a second update"):
        optimizer.update(optimizer.shards[0])


@given(seeds)
def test_a_bf16_master_is_one_of_the_two_neighbours_of_the_fp32_update(seed):
    """One step from the same weights. Both neighbours occur, and the moments, which are fp32, are the same."""
    weights, gradients = make_problem(seed)
    weights = weights.bfloat16()
    narrow, wide = (AdamW(make_shards(w, [0, TOTAL]), CONFIG) for w in (weights, weights.float()))
    for optimizer in (narrow, wide):
        run(optimizer, gradients[:1], [1.0], [0, TOTAL])
    ours, exact = flatten(narrow), flatten(wide)
    assert torch.equal(ours[1:], exact[1:])
    towards_zero = (exact[0].view(torch.int32) & -(2**16)).view(torch.float32)
    away = (towards_zero.view(torch.int32) + 2**16).view(torch.float32)
    down, up = ours[0] == towards_zero, ours[0] == away
    assert (down | (up & (exact[0] != towards_zero))).all()
    assert down.any() and up.any()


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda s: s.pop("shard1"), r"missing \['shard1'\]"),
        (lambda s: s.update(other={}), r"unexpected \['other'\]"),
        (lambda s: s.pop("step"), r"missing \['step'\]"),
        (lambda s: s.update(step=-1), "step -1"),
        (lambda s: s["shard1"].pop("exp_avg_sq"), r"shard1 has \['exp_avg'\]"),
        (lambda s: s["shard1"].update(exp_avg=torch.zeros(1)), r"exp_avg of shard1 is .* of shape \(1,\)"),
        (lambda s: s["shard1"].update(exp_avg=s["shard1"]["exp_avg"].double()), "exp_avg of shard1 is torch.float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, complaint):
    weights, gradients = make_problem(0)
    borders = [0, 30, TOTAL]
    source, target = AdamW(make_shards(weights, borders), CONFIG), AdamW(make_shards(weights, borders), CONFIG)
    run(source, gradients, SCALES, borders)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=complaint):
        target.load_state_dict(state)
    assert target.num_steps == 0 and not flatten(target)[1:].any()
