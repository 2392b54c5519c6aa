"""Gradients and weights of the engine on 1 to 4 gloo processes, under every strategy and both gloo transports.

Oracle: the same module on one process, unsharded, over all microbatches of all ranks; torch.optim.AdamW. In fp32 the
only difference is the order in which gradients of different microbatches are added; with at most 12 summands of
similar size the relative error (largest absolute difference over largest value) is a few ulp, 12 · 2⁻²⁴ ≈ 7e-7 <
1e-6. With 16 bits on the wire the oracle computes in the wire dtype and adds microbatches up in fp32: equal roundings,
so the same bound, but for parameters that one backward uses more than once ([Note: addends] in `oracle`).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.model.linear import Linear
from minift.optim.adamw import AdamW
from minift.optim.config import OptimConfig
from minift.optim.shard import FlatShard, ParamRange
from minift.precision import Precision
from tests.fsdp.oracle import (
    Expected,
    expected_gradients,
    on_the_wire,
    reference_gradients,
    relative_error,
    rounds_sums,
    unsharded,
)
from tests.fsdp.trees import (
    BF16,
    BF16_MASTERS,
    FP16,
    FP32,
    NARROW_MASTERS,
    Case,
    Tree,
    cases,
    gathered_gradients,
    loss_of,
    microbatch,
    run_microbatches,
    set_path,
    sharded,
)
from tests.ranks import DEVICE, run_ranks

# Shrinking would run hundreds of distributed examples after a failure; the cases are small as they come.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
STRATEGIES = ["zero3", "zero2", "zero1", "ddp"]
# On a GPU 32 MiB a block, so that it would be early where nobody waits for a copy.
SIZES = {"width": 2048, "hidden": 8192} if DEVICE.type == "cuda" else {"width": 64, "hidden": 256}
FROM_THE_HOST = Case(1, **SIZES, depth=4, frozen="up", precision=BF16)
TRANSPORTS = ["shared", "paired"]
# fp32 masters with an fp32 wire are not gathered where ranks share memory. Narrower ones with that wire are.
WAYS = [
    {"transport": "shared"}, {"transport": "shared", "precision": NARROW_MASTERS}, {"transport": "paired"},
    {"transport": "paired", "grads_anew": True},
]  # fmt: skip
in_every_way = pytest.mark.parametrize("way", WAYS, ids=["resident", "shared", "paired", "anew"])
PRECISIONS = [FP32, FP32, FP32, NARROW_MASTERS, BF16, FP16, BF16_MASTERS]


def gradients_on_rank(world: World, case: Case) -> dict[str, Tensor]:
    model, engine = sharded(case, world)
    for _ in range(2):  # the second time, gathers run ahead by the recorded order and nothing is left of the first
        engine.clear_gradients()
        run_microbatches(model, engine, case, world.rank)
    if not case.paths:
        assert engine.parameters_without_grad() == []
    return gathered_gradients(engine)


def check_gradients(case: Case) -> None:
    expected = expected_gradients(case)
    for gradients in run_ranks(case.world_size, gradients_on_rank, case):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert expected[name].admits(gradient), name


@settings(max_examples=120, deadline=None, phases=PHASES)
@example(FROM_THE_HOST.but(policy=ShardPolicy(offload_frozen=("blocks",), prefetch_units=2)))
@example(FROM_THE_HOST.but(policy=ShardPolicy(offload=True)))
@given(case=cases(precisions=PRECISIONS))
def test_gradients_equal_one_process(case: Case) -> None:
    check_gradients(case)


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(case=cases(replicas=True, precisions=PRECISIONS))
def test_gradients_with_replicas_equal_one_process(case: Case) -> None:
    check_gradients(case)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("precision", [BF16, FP16, BF16_MASTERS], ids=["bf16", "fp16", "bf16-masters"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_16_bits_on_the_wire(world_size: int, precision: Precision, transport: str) -> None:
    """One use of each parameter: 1e-6, although each gradient is off by a thousand times that."""
    check_gradients(
        Case(
            world_size, 8, 24, tied=False, frozen="up", microbatches=2, transport=transport, seed=4, precision=precision
        )
    )


STEPS = 3
# eps is large against the root of the second moment, or Adam would turn rounding errors of a vanishing gradient into
# steps of full size. As it is, an error e of a gradient moves a weight by at most lr / eps · e = 0.05 e in a step.
ADAMW = OptimConfig(lr=0.05, eps=1.0, weight_decay=0.1, no_decay=(), max_grad_norm=None)


def weights_on_rank(world: World, case: Case, steps: int) -> dict[str, Tensor]:
    model, engine = sharded(case, world)
    optimizer = AdamW(engine.trainable_shards(), ADAMW)
    for _ in range(steps):
        if case.policy.step_in_backward:
            optimizer.begin_step(1.0)
            engine.update_in_backward(optimizer.update)
        run_microbatches(model, engine, case, world.rank)
        if not case.policy.step_in_backward:
            optimizer.step(1.0)
        engine.weights_changed()
        engine.clear_gradients()
        with torch.no_grad():
            model.path = list(range(case.depth))
            model(microbatch(case, world.rank, 0))  # an evaluation between steps disturbs nothing
    return {name: tensor.cpu().clone() for name, tensor in engine.full_tensors()}


def expected_weights(case: Case) -> dict[str, Expected]:
    """In fp32 after STEPS steps; with 16 bits on the wire after one, because a master that is off by the least may be
    rounded to the other neighbour, and the second step's gradients are those of another model."""
    masters = Tree(case)
    trained = {name: p for name, p in masters.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=ADAMW.lr, betas=tuple(ADAMW.betas), eps=ADAMW.eps, weight_decay=ADAMW.weight_decay
    )
    for _ in range(steps_of(case)):
        gradients = expected_gradients(case, masters)
        for name, parameter in trained.items():  # torch skips those without gradient; here it is zero, and they decay
            parameter.grad = gradients[name].value.float()
        optimizer.step()
    weights = {}
    for name, parameter in masters.named_parameters():
        if case.precision == FP32:
            weights[name] = Expected(parameter.detach())
        elif parameter.requires_grad:
            weights[name] = Expected(parameter.detach(), ADAMW.lr / ADAMW.eps * gradients[name].tolerance)
        else:
            weights[name] = Expected(parameter.to(case.precision.wire_dtype))
    return weights


def steps_of(case: Case) -> int:
    return STEPS if case.precision == FP32 else 1


def check_weights(case: Case) -> None:
    expected = expected_weights(case)
    for weights in run_ranks(case.world_size, weights_on_rank, case, steps_of(case)):
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert expected[name].admits(weight), name


@settings(max_examples=40, deadline=None, phases=PHASES)
@given(case=cases(precisions=[FP32, FP32, FP32, BF16, FP16]))
def test_weights_after_steps_equal_one_process(case: Case) -> None:
    check_weights(case)


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    case=cases(precisions=[FP32, FP32, FP32, BF16, FP16]),
    reshard=st.booleans(),
    strategy=st.sampled_from(["zero2", "zero3"]),
)
def test_updating_in_backward_gives_the_same_weights(case: Case, reshard: bool, strategy: str) -> None:
    policy = ShardPolicy(strategy=strategy, reshard_after_forward=reshard, step_in_backward=True)
    check_weights(case.but(microbatches=1, policy=policy, paths=once(case.paths[:1])))


def once(paths: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Every unit runs at most once in a microbatch."""
    return tuple(tuple(dict.fromkeys(path)) for path in paths)


def bits_after_steps(case: Case) -> dict[str, Tensor]:
    """By minift's optimizer, on whole parameters of one process."""
    home = torch.device("cpu") if case.policy.offload else DEVICE  # where the engine's optimizer updates
    masters = {name: p.detach().to(home, case.precision.master_dtype) for name, p in Tree(case).named_parameters()}
    model = unsharded(case)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = [
        FlatShard(
            name,
            masters[name].view(-1),
            torch.zeros(p.numel(), device=home),
            [ParamRange(name, 0, p.numel(), 0, tuple(p.shape))],
        )
        for name, p in trained.items()
    ]
    optimizer = AdamW(whole, ADAMW)
    for _ in range(STEPS):
        for flat in whole:
            flat.grad.zero_()
        for rank in range(case.world_size):
            for index in range(case.microbatches):
                loss_of(model, case, rank, index).backward()
                for flat in whole:
                    if trained[flat.name].grad is not None:
                        flat.grad += trained[flat.name].grad.view(-1).to(home)
                model.zero_grad()
        if rounds_sums(case):
            for flat in whole:
                flat.grad.copy_(flat.grad.to(case.precision.reduce_dtype))
        optimizer.step(1.0)
        for name, parameter in trained.items():
            parameter.data.copy_(on_the_wire(masters[name], case))
    return {name: (masters[name] if name in trained else p.detach()).cpu() for name, p in model.named_parameters()}


# A GPU adds products of 16-bit factors to fp32 sums without rounding them, which autograd, the oracle, cannot do.
OF_ROUNDED_PRODUCTS = [NARROW_MASTERS] if DEVICE.type == "cuda" else [BF16, FP16, BF16_MASTERS, NARROW_MASTERS]
# And the gradients of a token's occurrences it adds there one by one, to what an earlier microbatch has left: three.
DISTINCT = DEVICE.type == "cuda"


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(case=cases(max_world_size=2, precisions=OF_ROUNDED_PRODUCTS))
def test_sums_of_two_gradients_give_the_same_bits_after_steps(case: Case) -> None:
    """Two numbers have one sum, in whatever order. So nothing is left to differ, with 16 bits on the wire over several
    steps, and with masters that are rounded at random: the bits of chance belong to the element, not to the shard."""
    microbatches = 1 if case.world_size == 2 else min(case.microbatches, 2)
    case = case.but(microbatches=microbatches, tied=False, paths=once(case.paths[:microbatches]), distinct=DISTINCT)
    expected = bits_after_steps(case)
    for weights in run_ranks(case.world_size, weights_on_rank, case, STEPS):
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), name


def bits_on_rank(world: World, case: Case) -> dict[str, Tensor]:
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    return gathered_gradients(engine)


def test_transports_and_prefetch_and_resharding_change_no_bit() -> None:
    """Sums are formed in one order, whatever carries the addends and whenever it is done."""
    case = Case(3, frozen="up", microbatches=2, precision=BF16)
    variants = [
        case,
        case.but(transport="paired"),
        case.but(policy=ShardPolicy(prefetch_units=0)),
        case.but(policy=ShardPolicy(reshard_after_forward=False, prefetch_units=3)),
        case.but(policy=ShardPolicy(strategy="zero2"), transport="paired"),
        case.but(policy=ShardPolicy(offload=True)),
    ]
    expected = run_ranks(3, bits_on_rank, case)[0]
    for variant in variants:
        for gradients in run_ranks(3, bits_on_rank, variant):
            for name, gradient in gradients.items():
                assert torch.equal(gradient, expected[name]), (name, variant)


# ---------------------------------------------------------------------------------------------- unusual ways to run it


class Detached(nn.Module):
    """Backward reaches the last block only; one parameter of it is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linear(4, 4), Linear(4, 4)])
        self.blocks[1].spare = nn.Parameter(torch.zeros(3))
        for block in self.blocks:
            nn.init.ones_(block.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x).detach()).sum()


def unreached_on_rank(world: World) -> tuple[list[str], float]:
    model = Detached()
    engine = shard(model, list(model.blocks), world, ShardPolicy(), FP32)
    for _ in range(2):
        model(torch.ones(2, 4)).backward()
    gradients = gathered_gradients(engine)
    return engine.parameters_without_grad(), float(gradients["blocks.0.weight"].abs().sum())


def test_parameters_that_backward_does_not_reach_are_named_and_have_gradient_zero() -> None:
    assert run_ranks(2, unreached_on_rank) == [(["blocks.0.weight", "blocks.1.spare"], 0.0)] * 2


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


def gradients_after_an_exception(world: World, case: Case) -> dict[str, Tensor]:
    """An exception inside the second block's backward, the same on every rank; then an ordinary step."""
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    engine.clear_gradients()
    hook = model.blocks[1].norm.register_forward_hook(lambda module, args, output: Explodes.apply(output))
    with pytest.raises(ArithmeticError):
        model(microbatch(case, world.rank, 0)).backward()
    hook.remove()
    engine.reset()
    run_microbatches(model, engine, case, world.rank)
    return gathered_gradients(engine)


@in_every_way
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reshard", [True, False])
def test_the_engine_survives_an_exception_in_backward(reshard: bool, strategy: str, way: dict) -> None:
    policy = ShardPolicy(strategy=strategy, reshard_after_forward=reshard)
    case = Case(2, microbatches=2, policy=policy, seed=2, **way)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_after_an_exception, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


def gradients_by_another_path(world: World, case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """Steps that run the blocks in one order, then some of them in another."""
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    run_microbatches(model, engine, case, world.rank)
    engine.clear_gradients()
    run_microbatches(model, engine, case.but(paths=((3, 0, 2),)), world.rank)
    return gathered_gradients(engine), [unit.name for unit in engine.hooks.forward_order.recorded]


@in_every_way
@pytest.mark.parametrize("prefetch_units", [0, 1, 2])
def test_a_model_may_change_its_way(prefetch_units: int, way: dict) -> None:
    case = Case(2, depth=4, policy=ShardPolicy(prefetch_units=prefetch_units), **way)
    expected = reference_gradients(case.but(paths=((3, 0, 2),)))
    for gradients, recorded in run_ranks(2, gradients_by_another_path, case):
        assert recorded == ["", "blocks.3", "blocks.0", "blocks.2"]
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


def gradients_of_two_forwards(world: World, case: Case) -> dict[str, Tensor]:
    """A forward that nobody goes back through, an evaluation in between, and two forwards with one backward."""
    model, engine = sharded(case, world)
    model(microbatch(case, world.rank, 5))
    first = model(microbatch(case, world.rank, 0))
    with torch.no_grad():
        model(microbatch(case, world.rank, 7))
    second = model(microbatch(case, world.rank, 1))
    (first + second).backward()
    return gathered_gradients(engine)


@in_every_way
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_forwards_and_one_backward(strategy: str, way: dict) -> None:
    case = Case(2, microbatches=2, policy=ShardPolicy(strategy=strategy), **way)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_of_two_forwards, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


def gradients_after_clearing(world: World, case: Case) -> dict[str, Tensor]:
    """Gradients are cleared between a forward and its backward."""
    model, engine = sharded(case, world)
    loss = model(microbatch(case, world.rank, 0))
    engine.clear_gradients()
    loss.backward()
    return gathered_gradients(engine)


@pytest.mark.parametrize("grads_anew", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clearing_gradients_after_a_forward_loses_none(strategy: str, grads_anew: bool) -> None:
    case = Case(2, policy=ShardPolicy(strategy=strategy), transport="paired", grads_anew=grads_anew)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_after_clearing, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


def misuse_on_rank(world: World, case: Case) -> tuple[str, str]:
    """Two backwards that both claim to be the last of the step; a forward after a failed backward."""
    model, engine = sharded(case, world)
    if case.policy.step_in_backward:
        engine.update_in_backward(lambda shard: None)
    model(microbatch(case, world.rank, 0)).backward()
    with pytest.raises(RuntimeError) as late:
        model(microbatch(case, world.rank, 1)).backward()
    with pytest.raises(RuntimeError) as unreset:
        model(microbatch(case, world.rank, 1))
    engine.reset()
    model(microbatch(case, world.rank, 1)).backward()
    return str(late.value), str(unreset.value)


@pytest.mark.parametrize(
    ("world_size", "policy"),
    [
        (2, ShardPolicy(strategy="zero1")),
        (2, ShardPolicy(strategy="ddp")),
        (4, ShardPolicy(replicas=2)),
        (2, ShardPolicy(step_in_backward=True)),
    ],
)
def test_a_backward_after_the_last_is_refused(world_size: int, policy: ShardPolicy) -> None:
    for late, unreset in run_ranks(world_size, misuse_on_rank, Case(world_size, policy=policy)):
        assert "expect_microbatch(is_last=False)" in late
        assert "engine.reset()" in unreset


def loss_after_a_change_of_path(world: World, case: Case) -> float:
    """An update while a unit is gathered ahead that then does not run."""
    model, engine = sharded(case, world)
    optimizer = AdamW(engine.trainable_shards(), ADAMW)
    for path in ((0, 1, 2, 3), (0, 2, 3)):
        run_microbatches(model, engine, case.but(paths=(path,)), world.rank)
        optimizer.step(1.0)
        engine.weights_changed()
        engine.clear_gradients()
    with torch.no_grad():
        set_path(model, case, 0)
        return float(model(microbatch(case, 0, 0)))


@in_every_way
def test_no_strategy_reads_weights_of_before_the_update(way: dict) -> None:
    losses = []
    for strategy in STRATEGIES:
        case = Case(2, depth=4, policy=ShardPolicy(strategy=strategy), **way)
        losses += run_ranks(2, loss_after_a_change_of_path, case)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class PairBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(4, 4)
        nn.init.eye_(self.linear.weight)

    def forward(self, pair: Pair) -> tuple[Tensor, Tensor]:
        return self.linear(pair.left), pair.right


class TakesPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PairBlock(), PairBlock()])

    def forward(self, x: Tensor) -> Tensor:
        pair = Pair(x, x * 2)
        for block in self.blocks:
            pair = Pair(*block(pair))
        return (pair.left * pair.right).sum()


def pairs_on_rank(world: World) -> Tensor:
    model = TakesPairs()
    engine = shard(model, list(model.blocks), world, ShardPolicy(), FP32)
    model(torch.ones(2, 4, requires_grad=True)).backward()
    return gathered_gradients(engine)["blocks.0.linear.weight"]


def test_named_tuples_are_inputs_like_any() -> None:
    """loss = sum of x · 2x, so each of the 16 weights has gradient 2 rows · 1 · 2, on each of 2 ranks."""
    for gradient in run_ranks(2, pairs_on_rank):
        assert torch.equal(gradient, torch.full((4, 4), 8.0))


# ------------------------------------------------------------------------------------------------- gathered parameters


def gradients_with_poisoned_ring(world: World, case: Case) -> dict[str, Tensor]:
    """Overwrite the gather buffers between forward and backward, as other units would, and lend them in another order:
    last in, first out, each block would get the very buffer back that it had in forward."""
    model, engine = sharded(case, world)
    loss = model(microbatch(case, world.rank, 0))
    (ring,) = {id(unit.gather_ring): unit.gather_ring for unit in engine.units[1:]}.values()
    for buffer in ring.buffers:
        buffer.memory.fill_(0xFF)  # NaN in fp32
    ring._free.reverse()
    loss.backward()
    return gathered_gradients(engine)


def test_nothing_saved_for_backward_lives_in_the_ring() -> None:
    case = Case(2, tied=False, transport="paired", seed=1, depth=4)
    expected = reference_gradients(case)
    for gradients in run_ranks(2, gradients_with_poisoned_ring, case):
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) <= 1e-6, name


class TorchLinearTree(nn.Module):
    """A block that falls into the trap: `nn.Linear` saves a transposed view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def run_torch_linear(world: World) -> str:
    model = TorchLinearTree()
    shard(model, list(model.blocks), world, ShardPolicy(), FP16)  # whose masters have to be gathered
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(3, 8, dtype=torch.float16, requires_grad=True))
    return str(caught.value)


def test_saving_a_view_of_a_gathered_parameter_is_refused() -> None:
    for message in run_ranks(2, run_torch_linear):
        assert "saved a view of a gathered parameter" in message and "(8, 8)" in message


def placeholders_on_rank(world: World, case: Case) -> set[str]:
    """Names of the parameters that are gathered, after a look at all of them."""
    model, engine = sharded(case, world)
    weights = dict(unsharded(case).named_parameters())
    model(microbatch(case, world.rank, 0)).backward()
    with torch.no_grad():
        model(microbatch(case, world.rank, 1))
    gathered = {name for bucket in engine.buckets if not bucket.resident for name in bucket.params}
    for name, parameter in model.named_parameters():
        assert parameter.shape == weights[name].shape
        if name in gathered:
            assert parameter.isnan().all()
            assert parameter.untyped_storage().nbytes() == parameter.itemsize
        else:
            assert torch.equal(parameter, weights[name])
    return gathered


@pytest.mark.parametrize(
    ("transport", "precision", "is_gathered"),
    [
        ("paired", FP32, lambda name: True),
        ("paired", BF16, lambda name: True),
        ("shared", FP16, lambda name: "up" not in name),  # what is frozen lies in memory that all ranks see
        ("shared", BF16, lambda name: False),  # and of what is trained, that which is in the dtype of the wire
        ("shared", BF16_MASTERS, lambda name: False),
        ("shared", FP32, lambda name: False),
    ],
)
def test_between_steps_parameters_are_nan_and_hold_no_memory(transport: str, precision: Precision, is_gathered) -> None:
    """All but those that are never gathered, which stay readable."""
    case = Case(2, frozen="up", transport=transport, precision=precision)
    expected = {name for name, _ in Tree(case).named_parameters() if is_gathered(name)}
    assert run_ranks(2, placeholders_on_rank, case) == [expected] * 2


def grad_memory_on_rank(world: World, case: Case) -> set[str]:
    """Which weights' gradients were computed inside of the buffer that is reduced, and by the GEMM itself."""
    model, engine = sharded(case, world)
    written: set[str] = set()
    original = torch.mm

    def watching(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        result = original(a, b) if out is None else original(a, b, out=out)
        for unit in engine.units:
            for bucket in unit.trainable:
                for span, slot in zip(bucket.layout.spans, bucket._slots, strict=False):
                    if out is not None and slot.tensor.data_ptr() == out.data_ptr():
                        written.add(span.name)
        return result

    torch.mm = watching
    try:
        model(microbatch(case, world.rank, 0)).backward()
    finally:
        torch.mm = original
    return written


@pytest.mark.parametrize("strategy", ["zero3", "ddp"])
def test_weight_gradients_are_computed_in_the_reduce_buffer(strategy: str) -> None:
    case = Case(2, tied=False, policy=ShardPolicy(strategy=strategy))
    expected = {"head.weight"} | {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("up", "down")}
    assert run_ranks(2, grad_memory_on_rank, case) == [expected] * 2


def padding_on_rank(world: World, case: Case) -> float:
    """Largest gradient outside of every parameter. Reduce buffers are shared: each unit finds another's values."""
    model, engine = sharded(case, world)
    run_microbatches(model, engine, case, world.rank)
    largest = 0.0
    for flat_shard in engine.trainable_shards():
        outside = torch.ones_like(flat_shard.grad, dtype=torch.bool)
        for r in flat_shard.ranges:
            outside[r.start : r.stop] = False
        largest = max([largest, *flat_shard.grad[outside].abs().tolist()])
    return largest


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("how", [{}, {"transport": "paired", "grads_anew": True}], ids=["stay", "anew"])
def test_padding_has_no_gradient(world_size: int, strategy: str, how: dict) -> None:
    policy = ShardPolicy(strategy=strategy)
    case = Case(world_size, tied=False, microbatches=2, policy=policy, depth=5, uneven=True, **how)
    assert run_ranks(world_size, padding_on_rank, case) == [0.0] * world_size


def load_on_rank(world: World, case: Case) -> tuple[int, dict[str, Tensor]]:
    """Meta construction; each rank asks for its own ranges only."""
    values = {name: p.detach().reshape(-1) for name, p in Tree(case).named_parameters()}
    with torch.device("meta"):
        model = Tree(case, filled=False)
    engine = shard(model, list(model.blocks), world, case.policy, FP32)
    asked = 0

    def read(name: str, start: int, stop: int) -> Tensor:
        nonlocal asked
        asked += stop - start
        return values[name][start:stop]

    engine.load(read)
    return asked, {name: tensor.clone() for name, tensor in engine.full_tensors()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_meta_construction_reads_every_element_once(world_size: int) -> None:
    case = Case(world_size, frozen="up", seed=5)
    expected = {name: p.detach() for name, p in Tree(case).named_parameters()}
    results = run_ranks(world_size, load_on_rank, case)
    assert sum(asked for asked, _ in results) == sum(p.numel() for p in expected.values())
    for _, tensors in results:
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name
