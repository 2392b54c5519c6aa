"""Puts a run together on paper and reads it off: `shapes.RunShape`.

    run = describe(config, setup, world_size=512, link="nccl", workload=Workload(tokens=8192, document_tokens=4096))

Nothing of the engine's rules is repeated here. The model is put together by `build.construct` and cut up by
`fsdp.shard`, as for training, but on the meta device and between ranks that do not exist; what came out is read off
into frozen values, which know no tensors. So whatever the engine learns to do, the plan follows. What happens in a step
is not here: bytes are `memory`, operations `work`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from minift.build import construct
from minift.dist.process import World
from minift.fsdp import shard
from minift.fsdp.bucket import Bucket
from minift.fsdp.transport import Transport
from minift.fsdp.unit import Ring, Unit
from minift.model.config import ModelConfig
from minift.model.linear import LinearBase
from minift.peft.adapter import AdapterModule
from minift.peft.inject import adapters
from minift.planner.methods import MethodShape, method_of
from minift.planner.shapes import (
    BucketShape,
    Link,
    ParameterShape,
    ProjectionShape,
    RingShape,
    RunShape,
    Setup,
    UnitShape,
    UpdateShape,
    Workload,
)
from minift.quant.linear import NF4Linear
from minift.quant.weights import QuantWeights
from minift.recompute import Policy


def describe(
    config: ModelConfig,
    setup: Setup,
    *,
    world_size: int,
    link: Link,
    workload: Workload,
    weights: QuantWeights | None = None,
) -> RunShape:
    """What rank 0 of `world_size` would hold and run. weights: of a folder, if there is one: it may be in NF4 already.

    ValueError for what building would refuse: a pattern that matches nothing, ranks that form no groups, ...
    """
    on_paper = construct(config, weights, setup.adapter, quant=setup.quant, train=setup.train, freeze=setup.freeze)
    module = on_paper.module
    known: dict[str, MethodShape] = {}  # found now, as what is sharded cannot be run
    methods = {id(adapter): method_of(adapter, known) for adapter in adapters(module).values()}
    num_prompt = module.model.embed_tokens.num_virtual_tokens
    blocks = module.shard_units()
    backend = "nccl" if link == "nccl" else "gloo"
    world = World(0, world_size, 0, torch.device("meta"), backend, group=None)
    engine = shard(module, blocks, world, setup.fsdp, setup.precision, connect=lambda members: _Paper(members, link))
    recomputed = {id(unit) for unit in blocks[:: setup.recompute.every]}
    rings: dict[int, int] = {}
    return RunShape(
        model=config,
        units=tuple(
            _unit(
                unit,
                list(_projections(unit.module, f"{unit.name}." if unit.name else "", [] if unit.name else blocks)),
                setup.recompute.policy if id(unit.module) in recomputed else "none",
                rings,
                methods,
            )
            for unit in engine.units
        ),
        workload=workload,
        policy=setup.fsdp,
        precision=setup.precision,
        optim=setup.optim,
        recompute=setup.recompute,
        adapter="" if setup.adapter is None else type(setup.adapter).__name__.removesuffix("Config"),
        world_size=world_size,
        shard_size=engine.shard_world.size,
        link=link,
        num_parameters=on_paper.num_parameters,
        num_trainable_parameters=on_paper.num_trainable_parameters,
        scratch_bytes=engine.scratch_bytes,
        num_prompt=num_prompt,
        num_prefix=module.num_virtual_tokens - num_prompt,
    )


class _Paper(Transport):
    """Buffers on the meta device, as `link` would have them (`fsdp/transport.py`); nothing is ever exchanged."""

    def __init__(self, world: World, link: Link) -> None:
        super().__init__(world)
        self.shares_memory = link == "shared memory" and world.size > 1
        self.sums_in_fp32 = link != "nccl" or world.size == 1

    def meet(self) -> None:
        """There is nobody to wait for."""


def _unit(
    unit: Unit,
    projections: list[tuple[str, LinearBase]],
    recompute: Policy,
    rings: dict[int, int],
    methods: dict[int, MethodShape],
) -> UnitShape:
    return UnitShape(
        unit.name,
        tuple(_bucket(bucket) for bucket in unit.buckets),
        tuple(_projection(name, module, methods.get(id(module), MethodShape())) for name, module in projections),
        unit.keep,
        recompute,
        _ring(unit.gather_ring, rings),
        _ring(unit.reduce_ring, rings),
    )


def _ring(ring: Ring, keys: dict[int, int]) -> RingShape:
    return RingShape(keys.setdefault(id(ring), len(keys)), len(ring.buffers), ring.num_bytes)


def _bucket(bucket: Bucket) -> BucketShape:
    return BucketShape(
        bucket.name,
        bucket.trainable,
        tuple(
            ParameterShape(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), bucket.trainable)
            for name, p in bucket.params.items()
        ),
        bucket.dtypes.storage.itemsize,
        0 if bucket.lower is None else bucket.lower.itemsize,
        bucket.dtypes.wire.itemsize,
        bucket.dtypes.grad.itemsize,
        bucket.layout.shard_numel,
        bucket.layout.full_numel,
        bucket.resident,
        bucket.offload,
        bucket.keeps_full_grads,
        bucket.gather_bytes,
        bucket.reduce_bytes,
        tuple(bucket.layout.local_ranges(0)),
    )


def _projections(module: nn.Module, prefix: str, without: list[nn.Module]) -> Iterator[tuple[str, LinearBase]]:
    """Outermost projections inside `module` and not in `without`: an adapter, not what it wraps."""
    for name, child in module.named_children():
        if isinstance(child, LinearBase):
            yield prefix + name, child
        elif not any(child is other for other in without):
            yield from _projections(child, f"{prefix}{name}.", without)


def _projection(name: str, module: LinearBase, method: MethodShape) -> ProjectionShape:
    parts = module.parts()
    base, updates = parts or (module, ())
    while isinstance(base, AdapterModule):  # a method with a forward of its own
        base = base.base
    weight = base.dense_parameter()
    bias = base.bias
    return ProjectionShape(
        name,
        module.in_features,
        module.out_features,
        "nf4" if isinstance(base, NF4Linear) else "dense",
        bias is not None,
        weight is not None and weight.requires_grad,
        bias is not None and bias.requires_grad,
        type(module).__name__ if isinstance(module, AdapterModule) else "",
        tuple(UpdateShape(len(update.A), update.dropout) for update in updates),
        method,
        base.block_size if isinstance(base, NF4Linear) else 0,
    )
