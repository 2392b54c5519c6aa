"""Oracle: steps that were taken, every allocation of which was counted (`measured`), and arithmetic done by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.dist.process import World
from minift.fsdp import ShardPolicy
from minift.model.config import ModelConfig
from minift.ops import matmul
from minift.ops.matmul import widened_bytes
from minift.optim.config import OptimConfig
from minift.peft.bitfit import BitFitConfig
from minift.peft.bottleneck import BottleneckConfig
from minift.peft.dora import DoraConfig
from minift.peft.ia3 import IA3Config
from minift.peft.lora import LoraConfig
from minift.peft.prefix import PrefixConfig
from minift.peft.prompt import PromptConfig
from minift.planner.activations import RANDOM_STATE_BYTES
from minift.planner.describe import describe
from minift.planner.memory import PERSISTENT, TRANSIENT, MemoryPlan, plan_memory
from minift.planner.shapes import Workload
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from tests.planner.measured import Case, Measured, Setup, measure
from tests.planner.test_describe import LLAMA_8B, LLAMA_70B
from tests.ranks import run_ranks

# Against what a step takes #

NUM_CASES = 24
TOLERANCE = 0.05


def draw(random: random.Random) -> Case:
    """A configuration, large enough for tensors to be what its memory is spent on."""
    pick = random.choice
    num_ranks, tied = pick([1, 2, 2, 3]), pick([False, True])
    model = {
        "model_type": pick(["llama", "qwen2", "qwen3"]), "vocab_size": pick([512, 2048, 8192]),
        "hidden_size": pick([256, 384]), "intermediate_size": pick([704, 1024]), "num_hidden_layers": pick([2, 3, 4]),
        "num_attention_heads": pick([4, 8]), "num_key_value_heads": pick([2, 4]), "head_dim": pick([32, 64]),
        "tie_word_embeddings": tied,
    }  # fmt: skip
    method = pick(
        [
            {},
            {"freeze": ("layers.0",) if tied else ("embed", "layers.0")},
            {"adapter": LoraConfig()},
            {"adapter": LoraConfig(r=8, targets=pick([["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "o_proj"]]))},
            {"adapter": LoraConfig(dropout=0.1)},
            {"adapter": LoraConfig(), "quant": QuantConfig(double_quant=pick([True, False]))},
            {"adapter": LoraConfig(dropout=0.1), "quant": QuantConfig(block_size=32)},
            {"adapter": pick([DoraConfig(), IA3Config(), BitFitConfig(), BottleneckConfig(size=16)])},
            {"adapter": pick([DoraConfig(), IA3Config(targets="all-linear")]), "quant": QuantConfig()},
            {"adapter": pick([PrefixConfig(), PrefixConfig(projection=True)]), "quant": pick([None, QuantConfig()])},
            {"adapter": PromptConfig(num_virtual_tokens=pick([5, 50])), "quant": pick([None, QuantConfig()])},
        ]
    )
    policy = pick(
        [ShardPolicy()] * 3
        + [ShardPolicy("zero2"), ShardPolicy("zero1"), ShardPolicy("ddp"), ShardPolicy(replicas=num_ranks)]
        + [ShardPolicy(reshard_after_forward=False), ShardPolicy(keep_gathered=("layers.1",), prefetch_units=0)]
        + [ShardPolicy(step_in_backward=True), ShardPolicy(offload=True)]
        + [ShardPolicy(offload_frozen=("layers.1",))] * ("adapter" in method)
    )
    tokens = pick([256, 512, 1024])
    setup = Setup(
        **method,
        optim=OptimConfig(state=pick(["fp32", "8bit"]), max_grad_norm=None if policy.step_in_backward else 1.0),
        precision=pick(
            [Precision()] * 2
            + [Precision(wire="float32"), Precision(wire="float32", reduce="bfloat16")]
            + [Precision(master="bfloat16", stochastic_rounding=True)]
        ),
        fsdp=policy,
        recompute=RecomputeConfig(pick(["none", "selective", "full", "full", "offload"]), every=pick([1, 1, 2])),
    )
    work = Workload(
        tokens=tokens,
        document_tokens=tokens // pick([1, 2, 8]),
        microbatches=1 if policy.step_in_backward else pick([1, 2, 3]),
        targets=pick([None, tokens // 3]),
    )
    return Case(model, setup, work, num_ranks, pick(["shared memory", "paired sends"]))


def test_the_peak_is_what_a_step_takes() -> None:
    """Another two dozen configurations in every run; the message of a failure has all that repeats it."""
    seed = random.SystemRandom().randrange(1 << 32)
    source = random.Random(seed)
    wrong = []
    for number in range(NUM_CASES):
        case = draw(source)
        plan, measured, error = plan_and_error(case)
        if abs(error) > TOLERANCE:
            wrong.append(f"seed {seed} case {number}: {error:+.1%}, {measured}, {plan.categories()}, {case}")
    assert not wrong, "\n".join(wrong)


def plan_and_error(case: Case) -> tuple[MemoryPlan, Measured, float]:
    """The last: of the plan, relative to what was measured on the rank that held most."""
    plan = plan_memory(case.on_paper())
    measured = max(run_ranks(case.world_size, measure, case), key=lambda rank: rank.held + rank.peak)
    return plan, measured, (plan.peak_bytes + sum(plan.host.values())) / (measured.held + measured.peak) - 1


def as_without_products_in_16_bits(world: World, case: Case) -> Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_cpu_multiplies", lambda dtype: dtype.itemsize > 2)
        return measure(world, case)


@pytest.mark.parametrize(
    "setup",
    [Setup(), Setup(recompute=RecomputeConfig("full")), Setup(LoraConfig()), Setup(LoraConfig(), QuantConfig())],
    ids=["full", "recomputed", "lora", "qlora"],
)
def test_a_processor_that_cannot_multiply_16_bits_needs_fp32_beside(monkeypatch, setup: Setup) -> None:
    case = Case(SMALL, setup, Workload(tokens=256, document_tokens=256))
    without = plan_memory(case.on_paper()).peak_bytes if matmul._cpu_multiplies(torch.bfloat16) else 0
    monkeypatch.setattr(matmul, "_cpu_multiplies", lambda dtype: dtype.itemsize > 2)
    plan = plan_memory(case.on_paper())
    (measured,) = run_ranks(1, as_without_products_in_16_bits, case)
    assert plan.peak_bytes == pytest.approx(measured.held + measured.peak, rel=TOLERANCE)
    assert plan.peak_bytes > without


SMALL = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip


FP32, AGAIN = Precision(wire="float32"), RecomputeConfig("full")


@pytest.mark.parametrize(
    ("setup", "tokens", "peak"),
    [
        # the last forward, with what the block has kept so far
        (Setup(PrefixConfig(), QuantConfig(), precision=FP32, recompute=RecomputeConfig("selective")), 256, "forward"),
        # a gradient in bf16, and a piece of it in fp32 on the way to what earlier microbatches have left
        (Setup(train=("mlp",), recompute=AGAIN), 64, "backward"),
        # silu · up, made again beside the gradients of gate and up
        (Setup(LoraConfig(targets=["down_proj"]), train=("gate_proj", "up_proj"), precision=FP32,
               recompute=RecomputeConfig("selective")), 512, "backward"),
        # slices of weights in fp32
        (Setup(DoraConfig(), recompute=RecomputeConfig("selective")), 64, "forward"),
        # gate and up, their gradients, and one that the method makes of these
        (Setup(DoraConfig(), QuantConfig(), precision=FP32, recompute=AGAIN), 512, "backward"),
        # of gate alone: the result of up is gone by then
        (Setup(DoraConfig(targets=["v_proj", "gate_proj"]), QuantConfig(), precision=FP32), 512, "backward"),
        # all that a forward of a method's own makes, beside what it keeps
        (Setup(DoraConfig(dropout=0.1), precision=FP32, recompute=AGAIN), 512, "backward"),
        # a method that hands gradients on
        (Setup(BitFitConfig(), QuantConfig(), precision=FP32, recompute=AGAIN), 512, "backward"),
        # the block when it runs again, with its last product
        (Setup(IA3Config(targets="all-linear"), QuantConfig(), precision=FP32, recompute=AGAIN), 512, "backward"),
    ],
    ids=lambda value: getattr(value.adapter, "method", "") if isinstance(value, Setup) else str(value),
)
def test_moments_at_which_few_configurations_have_their_peak(setup: Setup, tokens: int, peak: str) -> None:
    """To the percent, where torch's products take no scratch memory of their own: in fp32, or not at the peak."""
    work = Workload(tokens=tokens, document_tokens=tokens // 2, microbatches=2, targets=tokens // 3)
    plan, measured, error = plan_and_error(Case(SMALL, setup, work))
    if not widened_bytes(1, 1, 1, setup.precision.wire_dtype):  # which moves the peak
        assert plan.peak.name == f"{peak} of model.layers.1"
    assert abs(error) < 0.01, (error, measured, plan.categories())


@pytest.mark.parametrize("document_tokens", [512, 1024, 2048])
def test_the_backward_of_attention_can_be_the_peak(document_tokens: int) -> None:
    """Queries wider than the rest, and nothing kept but to run again: parts of dq, and the scratch of a thread."""
    wide = SMALL | {"model_type": "llama", "num_attention_heads": 16, "head_dim": 64, "intermediate_size": 256}
    work = Workload(tokens=2048, document_tokens=document_tokens, microbatches=1, targets=64)
    case = Case(wide, Setup(PromptConfig(num_virtual_tokens=8), recompute=AGAIN), work)
    plan, measured, error = plan_and_error(case)
    assert plan.peak.name == "backward of model.layers.1"
    assert abs(error) < 0.01, (error, measured, plan.categories())


# Arithmetic #

GB = 1e9


def plan_of(hf: dict, setup: Setup, work: Workload, world_size: int = 1) -> MemoryPlan:
    run = describe(ModelConfig.from_hf(hf), setup, world_size=world_size, link="nccl", workload=work)
    return plan_memory(run)


def everywhere(plan: MemoryPlan) -> dict[str, int]:
    """What is there when weights are updated."""
    return plan.persistent | {"gradients": plan.persistent["gradients"] + plan.moments[-1].bytes["gradients"]}


def work_of(tokens: int) -> Workload:
    return Workload(tokens=tokens, document_tokens=min(tokens, 4096))


QLORA = Setup(LoraConfig(r=16), QuantConfig())


@pytest.mark.parametrize(
    ("hf", "setup", "tokens", "gigabytes"),
    [
        (LLAMA_8B, replace(QLORA, recompute=RecomputeConfig("selective")), 8192, 31.8),
        (LLAMA_8B, replace(QLORA, recompute=RecomputeConfig("full")), 8192, 9.9),
        (LLAMA_8B, replace(QLORA, recompute=RecomputeConfig("full")), 2048, 7.5),
        (LLAMA_70B, replace(QLORA, recompute=RecomputeConfig("full")), 4096, 50.0),
    ],
)
def test_the_arithmetic_of_qlora(hf, setup, tokens, gigabytes) -> None:
    """performance.md, section 4.4, which counts parts of it roughly: within a tenth."""
    assert plan_of(hf, setup, work_of(tokens)).peak_bytes / GB == pytest.approx(gigabytes, rel=0.1)


def test_full_fine_tuning_takes_sixteen_bytes_a_weight_and_its_activations() -> None:
    """fp32 masters, gradients and two moments; whatever the wire, in one process. With bf16 masters and 8-bit moments
    8, and two fp32 scales for 256 weights. Gradients are 4 of them, and there when it updates."""
    numel = 8_030_261_248
    lean = Setup(precision=Precision(master="bfloat16", stochastic_rounding=True), optim=OptimConfig(state="8bit"))
    for setup, in_all in ((Setup(precision=Precision(wire="float32")), 16), (Setup(), 16), (lean, 2 + 4 + 2 + 8 / 256)):
        plan = plan_of(LLAMA_8B, setup, work_of(1))
        assert plan.persistent_bytes == pytest.approx((in_all - 4) * numel, rel=1e-3)
        assert plan.persistent_bytes + plan.moments[-1].total_bytes == pytest.approx(in_all * numel, rel=1e-3)


def test_gradients_on_a_gpu_are_there_from_backward_to_update() -> None:
    """With several ranks the shard of a block comes when its backward is over. A second microbatch begins with all."""
    hf = LLAMA_8B | {"num_hidden_layers": 4}
    for world_size, is_whole in ((1, True), (2, False)):
        plan = plan_of(hf, Setup(), work_of(64), world_size)
        held = [moment.bytes["gradients"] for moment in plan.moments]
        *forward, head, _, last, third, second, first, embedding, update = held
        root = held[0] if is_whole else update - embedding
        block = third - last
        assert forward == [head] * 4 and head == (root if is_whole else 0)
        assert [last, third, second, first] == [head + (k + is_whole) * block for k in range(4)]
        assert embedding == head + 4 * block
        assert update == root + 4 * block and plan.persistent["gradients"] == 0
    twice = plan_of(hf, Setup(), replace(work_of(64), microbatches=2), 2)
    assert {moment.bytes["gradients"] for moment in twice.moments} == {update}


def test_what_zero3_divides() -> None:
    """Rajbhandari et al., figure 1: everything by N, but for the buffers, which do not depend on N."""
    one, many = (everywhere(plan_of(LLAMA_70B, Setup(), work_of(1), n)) for n in (64, 512))
    for category in ("weights", "gradients", "optimizer state"):
        assert one[category] == pytest.approx(8 * many[category], rel=1e-3)
    for category in ("gathered buffers", "reduce buffers"):
        assert one[category] == pytest.approx(many[category], rel=1e-3)


POLICIES = ["none", "selective", "full", "offload"]


@given(st.integers(8, 4096), st.booleans(), st.integers(1, 3))
def test_more_recomputation_never_takes_more(tokens: int, adapted: bool, every: int) -> None:
    """But for silu · up, which `selective` makes again beside the gradients of both; what a block that runs again keeps
    and others need not: its input, if nothing before it is trained, and the state of random numbers; and for inputs on
    their way to the host and back."""
    setup = Setup(LoraConfig() if adapted else None)
    hf = LLAMA_8B | {"num_hidden_layers": 6}
    peaks = [
        plan_of(hf, replace(setup, recompute=RecomputeConfig(policy, every)), work_of(tokens)).peak_bytes
        for policy in POLICIES
    ]
    input_bytes, product_bytes = 2 * 4096 * tokens, 2 * 14336 * tokens
    assert peaks[0] + product_bytes >= peaks[1] and peaks[0] + input_bytes + RANDOM_STATE_BYTES >= peaks[2]
    assert peaks[2] >= peaks[3] - 2 * input_bytes


def test_a_plan_says_when_and_of_what() -> None:
    plan = plan_of(LLAMA_8B | {"num_hidden_layers": 2}, QLORA, work_of(4096))
    names = [moment.name for moment in plan.moments]
    blocks = ["model.layers.0", "model.layers.1"]
    assert names == [
        *(f"forward of {name}" for name in blocks), "head", "backward of head",
        *(f"backward of {name}" for name in reversed(blocks)), "optimizer",
    ]  # fmt: skip
    assert list(plan.categories()) == [*PERSISTENT, *TRANSIENT]
    assert sum(plan.categories().values()) == plan.peak_bytes
    assert plan.peak.name in names and plan.host == {}


def test_what_is_offloaded_or_paged_is_on_the_host() -> None:
    on_device = plan_of(LLAMA_8B, Setup(), work_of(64), 8)
    offloaded = plan_of(LLAMA_8B, Setup(fsdp=ShardPolicy(offload=True)), work_of(64), 8)
    paged = plan_of(LLAMA_8B, Setup(optim=OptimConfig(paged=True)), work_of(64), 8)
    assert paged.host == {"optimizer state": on_device.persistent["optimizer state"]}
    of_all = everywhere(on_device)
    assert offloaded.host == {
        name: of_all[name] for name in ("weights", "quantization scales", "gradients", "optimizer state")
    }
    assert offloaded.persistent["gathered buffers"] == on_device.persistent["gathered buffers"]
    both = plan_of(LLAMA_8B, Setup(optim=OptimConfig(paged=True), fsdp=ShardPolicy(offload=True)), work_of(64), 8)
    assert both.persistent == offloaded.persistent  # updated on the host, moments pass through no buffers

    lora = Setup(LoraConfig())
    half = plan_of(LLAMA_8B, replace(lora, fsdp=ShardPolicy(offload_frozen=("[13579]$",))), work_of(64))
    projections = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336  # and two norms; in bf16, of 16 of 32 blocks
    assert half.host == {"weights": 16 * 2 * (projections + 2 * 4096), "quantization scales": 0}
    away = plan_of(LLAMA_8B, replace(lora, recompute=RecomputeConfig("offload")), work_of(100))
    assert away.host == {"activations": 32 * 2**20}  # 100 · 4096 · 2 bytes of each block, pinned
    all_of_them = plan_of(LLAMA_8B, lora, work_of(64)).persistent["weights"]
    assert half.persistent["weights"] + half.host["weights"] == all_of_them
