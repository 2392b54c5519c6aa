"""Oracles: what papers and model cards say of sizes; the real engine, put together by real ranks from real weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minift.build import construct
from minift.dist.process import World
from minift.fsdp import ShardPolicy, shard
from minift.fsdp.shared_memory import SharedMemory
from minift.fsdp.transport import PairedSends, Transport
from minift.model.config import ModelConfig
from minift.peft.lora import LoraConfig
from minift.peft.lora_ga import LoraGaConfig
from minift.planner.describe import describe
from minift.planner.shapes import RunShape, Workload
from minift.planner.trial import TrialSetup as Setup
from minift.precision import Precision
from minift.quant.linear import QuantConfig
from minift.recompute import RecomputeConfig
from tests.ranks import run_ranks

TINY = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
WORK = Workload(tokens=64, document_tokens=16)


def paper(hf: dict, setup: Setup, world_size: int = 1, link: str = "nccl") -> RunShape:
    return describe(ModelConfig.from_hf(hf), setup, world_size=world_size, link=link, workload=WORK)


def test_numbers_of_parameters():
    """Meta's model cards: 8.03 and 70.6 billion; LoRA of rank r adds r (in + out) to each of seven projections."""
    run = paper(LLAMA_8B, Setup(LoraConfig(r=16)))
    assert run.num_parameters - run.num_trainable_parameters == 8_030_261_248
    assert run.num_trainable_parameters == 41_943_040
    assert paper(LLAMA_70B, Setup(), 512).num_parameters == 70_553_706_496


def test_four_bits_and_what_scales_cost():
    """QLoRA, section 3: 4 + 8 / 64 + 32 / (64 · 256) bits a weight, and one offset for each projection."""
    run = paper(LLAMA_8B, Setup(LoraConfig(), QuantConfig()))
    packed = [p for unit in run.blocks for p in unit.parameters if p.dtype == "uint8"]
    weights = sum(projection.weight_numel for unit in run.blocks for projection in unit.projections)
    assert sum(p.numel for p in packed) == weights / 2 + weights / 64 + 4 * (weights / 64 / 256 + 32 * 7)
    assert {p.storage for unit in run.blocks for p in unit.projections} == {"nf4"}
    assert [(p.name, p.storage) for p in run.root.projections] == [("lm_head", "dense")]


def test_what_a_unit_says():
    dropped = LoraConfig(r=8, dropout=0.5, targets=["q_proj", "down_proj"])
    run = paper(TINY, Setup(dropped, recompute=RecomputeConfig("selective", every=2)), 2, "shared memory")
    assert [unit.name for unit in run.units] == ["", "model.layers.0", "model.layers.1", "model.layers.2"]
    assert [unit.recompute for unit in run.units] == ["none", "selective", "none", "selective"]
    q, k, _, _, _, _, down = run.blocks[0].projections
    assert (q.name, q.in_features, q.out_features) == ("model.layers.0.self_attn.q_proj", 96, 96)
    assert (q.adapter, q.updates[0].rank, q.updates[0].dropout, q.trains_weight) == ("LoraLinear", 8, 0.5, False)
    assert (k.adapter, k.updates, k.out_features) == ("", (), 48)
    assert (down.in_features, down.updates[0].rank) == (200, 8)
    assert not run.root.trains and run.blocks[0].trains


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"document_tokens": 65}, "do not fit"),
        ({"tokens": 0}, "1 or more"),
        ({"targets": 65}, "0 to 64"),
        ({"microbatches": 0}, "microbatches"),
    ],
)
def test_an_impossible_workload_is_refused(changes, what):
    with pytest.raises(ValueError, match=what):
        replace(WORK, **changes)


def test_what_the_engine_refuses_the_plan_refuses():
    with pytest.raises(ValueError, match="valid: a divisor of 6"):
        paper(TINY, Setup(fsdp=ShardPolicy(replicas=4)), 6)
    with pytest.raises(ValueError, match="with an adapter"):
        paper(TINY, Setup(quant=QuantConfig()))


# Against the real engine #

METHODS = st.sampled_from(
    [
        Setup(),
        Setup(freeze=("embed", "layers.0")),
        Setup(train=("mlp",)),
        Setup(LoraConfig(r=3)),
        Setup(LoraConfig(r=2, targets=["v_proj", "lm_head"])),
        Setup(LoraConfig(r=4), QuantConfig(block_size=32)),
        Setup(LoraGaConfig(r=2), QuantConfig(block_size=32)),
        Setup(LoraConfig(r=4), QuantConfig(double_quant=False, skip=("q_proj",))),
    ]
)
PRECISIONS = st.sampled_from(
    [
        Precision(),
        Precision(wire="float32"),
        Precision(wire="float32", reduce="bfloat16"),
        Precision(master="bfloat16", stochastic_rounding=True),
    ]
)
POLICIES = st.sampled_from(
    [
        ShardPolicy(),
        ShardPolicy("zero2"),
        ShardPolicy("zero1"),
        ShardPolicy("ddp"),
        ShardPolicy(reshard_after_forward=False),
        ShardPolicy(keep_gathered=("layers.1",), prefetch_units=0),
        ShardPolicy(step_in_backward=True, prefetch_units=2),
        ShardPolicy("zero2", offload=True),
        ShardPolicy(offload_frozen=("layers.1",)),
        ShardPolicy(offload=True, step_in_backward=True),
    ]
)


@settings(max_examples=30, deadline=None)
@given(METHODS, PRECISIONS, POLICIES, st.integers(1, 3), st.sampled_from(["shared memory", "paired sends"]))
def test_the_plan_is_what_the_engine_makes(method, precision, policy, world_size, link):
    assume(method.adapter is not None or not policy.offload_frozen)  # of which there is nothing in full fine-tuning
    setup = replace(method, precision=precision, fsdp=policy)
    config = TINY | {"tie_word_embeddings": world_size == 2}
    run = paper(config, setup, world_size, link)
    for rank, (buckets, held) in enumerate(run_ranks(world_size, on_rank, config, setup, link)):
        planned = [
            (
                bucket.name,
                {p.name: (p.shape, p.dtype) for p in bucket.parameters},
                bucket.storage_itemsize,
                bucket.grad_itemsize,
                bucket.shard_numel,
                bucket.resident,
                bucket.keeps_full_grads,
                bucket.lower_itemsize,
            )
            for bucket in run.buckets
        ]
        assert planned == buckets
        rings = {ring.key: ring for unit in run.units for ring in (unit.gather_ring, unit.reduce_ring)}.values()
        assert sum(held.values()) == run.scratch_bytes + sum(
            [ring.count * ring.buffer_bytes for ring in rings]
            + [bucket.full_numel * bucket.wire_itemsize for bucket in run.buckets if bucket.resident]
            + [bucket.shard_numel * bucket.storage_itemsize for bucket in run.buckets if not bucket.resident]
            + [bucket.shard_numel * bucket.lower_itemsize for bucket in run.buckets]
            + [4 * grads_numel(bucket, run) for bucket in run.buckets if bucket.trainable]
        )
        if rank == 0:
            wholes = {p.name: p.numel for bucket in run.buckets for p in bucket.parameters}
            assert all(0 < n <= wholes[name] for bucket in run.buckets for name, n in bucket.local_numel.items())
    assert sum(math.prod(p.shape) for b in run.buckets if b.trainable for p in b.parameters) == (
        run.num_trainable_parameters
    )


def grads_numel(bucket, run: RunShape) -> int:
    """Of the gradients that a bucket has for itself; in a block that updates in backward, none."""
    if run.policy.step_in_backward and not bucket.name.startswith("(root)"):
        return 0
    return bucket.full_numel if bucket.keeps_full_grads else bucket.shard_numel


def on_rank(world: World, config: dict, setup: Setup, link: str):
    kinds = {"shared memory": SharedMemory.connect, "paired sends": PairedSends}

    def connect(members: World) -> Transport:
        return Transport(members) if members.size == 1 else kinds[link](members)

    model = construct(
        ModelConfig.from_hf(config), None, setup.adapter, quant=setup.quant, train=setup.train, freeze=setup.freeze
    ).module
    engine = shard(model, model.shard_units(), world, setup.fsdp, setup.precision, connect=connect)
    engine.load(lambda name, start, stop: torch.zeros(stop - start))
    buckets = [
        (
            bucket.name,
            {name: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in bucket.params.items()},
            bucket.shard.itemsize,
            bucket.dtypes.grad.itemsize,
            len(bucket.shard),
            bucket.resident,
            bucket.keeps_full_grads,
            0 if bucket.lower is None else bucket.lower.itemsize,
        )
        for bucket in engine.buckets
    ]
    return buckets, engine.held_bytes()
