"""A model cut into shards: which parameter belongs to which unit and bucket, and what a trainer may do with it.

The engine sees modules and tensors only. It is given the modules that make a unit; every other parameter, and every
parameter that two units share (tied embeddings), belongs to the root.

Memory per rank, in bytes, beside activations (closed form; `held_bytes()` reports the parts):

    shards     Σ_buckets shard_numel · storage itemsize  +  Σ_trainable shard_numel · 4
    gathered   num_slots · max_blocks(unit bytes)  +  root bytes         num_slots = 1, or all blocks without resharding
    gradients  max_trainable_buckets(full_numel) · reduce itemsize       one packing buffer, shared by all units

On gloo a reduce-scatter borrows as much again for the time it runs, for what the other ranks send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp.flat import Bucket
from minift.fsdp.hooks import Hooks
from minift.fsdp.policy import ShardPolicy
from minift.fsdp.unit import Ring, Unit, aligned
from minift.optim.shard import FlatShard
from minift.precision import Precision

_Owner = tuple[nn.Module, str]


class ShardedModel:
    """Handle of a sharded model. The module itself is used as before: call it, call backward on its loss."""

    def __init__(
        self, module: nn.Module, unit_modules: list[nn.Module], world: World, policy: ShardPolicy, precision: Precision
    ) -> None:
        self.module = module
        self.world = world
        groups = _assign_parameters(module, unit_modules)
        buckets = {
            name: _make_buckets(name, params, world, precision) for name, (_, params) in groups.items()
        }

        root_name, *block_names = groups
        block_bytes = [_slot_bytes(buckets[name]) for name in block_names]
        num_slots = min(1, len(block_names)) if policy.reshard_after_forward else len(block_names)
        self.block_ring = Ring(num_slots, max(block_bytes, default=0), world.device)
        self.root_ring = Ring(1, _slot_bytes(buckets[root_name]), world.device)
        trainable_numel = [b.layout.full_numel for bs in buckets.values() for b in bs if b.trainable]
        self._grad_buffer = torch.empty(
            max(trainable_numel, default=0), dtype=precision.reduce_dtype, device=world.device
        )

        units = [
            Unit(name, unit_module, buckets[name], ring, self._grad_buffer)
            for (name, (unit_module, _)), ring in zip(
                groups.items(), [self.root_ring, *[self.block_ring] * len(block_names)], strict=True
            )
        ]
        self.units = units
        self.hooks = Hooks(units[0], units[1:], [self.root_ring, self.block_ring], policy.reshard_after_forward)

    @property
    def buckets(self) -> Iterator[Bucket]:
        for unit in self.units:
            yield from unit.buckets

    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill every shard. `read(name, start, stop)` returns elements [start, stop) of the flattened parameter `name`
        (any float dtype); it is asked only for what this rank keeps."""
        for bucket in self.buckets:
            bucket.load(read)

    def trainable_shards(self) -> list[FlatShard]:
        """One flat shard per trainable bucket: what an optimizer, a norm or a checkpoint works on."""
        return [bucket.flat_shard() for bucket in self.buckets if bucket.trainable]

    def parameters_without_grad(self) -> list[str]:
        """Trainable parameters that no backward has reached yet (their gradient counts as zero)."""
        return sorted(name for unit in self.units for name in unit.without_grad)

    def full_tensors(self, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) in storage dtype, one bucket in memory at a time. Collective: all ranks iterate."""
        for bucket in self.buckets:
            if bucket.trainable or not trainable_only:
                yield from bucket.full_tensors()

    def reset(self) -> None:
        """Return to the state between steps after an exception in forward or backward: nothing gathered, no gradient.

        Every rank must have failed alike; a rank that failed alone leaves the others waiting in a collective.
        """
        self.hooks.reset()
        for parameter in self.module.parameters():
            parameter.grad = None
        for shard in self.trainable_shards():
            shard.grad.zero_()

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank holds between and during steps, by kind: shards, gathered, gradients."""
        tensors = [t for b in self.buckets for t in (b.shard, b.grad) if t is not None]
        return {
            "shards": sum(t.nbytes for t in tensors),
            "gathered": sum(slot.nbytes for ring in (self.block_ring, self.root_ring) for slot in ring.slots),
            "gradients": self._grad_buffer.nbytes,
        }


def _assign_parameters(
    module: nn.Module, unit_modules: list[nn.Module]
) -> dict[str, tuple[nn.Module, dict[str, list[_Owner]]]]:
    """{unit name: (module, {parameter name: places where it is registered})}, the root (name "") first."""
    names = {id(m): name for name, m in module.named_modules()}
    for unit_module in unit_modules:
        assert id(unit_module) in names, f"unit {type(unit_module).__name__} is not inside the model"
    unit_of_module = {
        id(inner): names[id(unit_module)] for unit_module in unit_modules for inner in unit_module.modules()
    }
    owners: dict[int, list[tuple[str, str, _Owner]]] = {}  # id(parameter) -> (full name, unit name, owner)
    for module_name, inner in module.named_modules():
        for local_name, parameter in inner.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{module_name}.{local_name}" if module_name else local_name
            owners.setdefault(id(parameter), []).append(
                (full_name, unit_of_module.get(id(inner), ""), (inner, local_name))
            )
    groups: dict[str, tuple[nn.Module, dict[str, list[_Owner]]]] = {"": (module, {})}
    groups |= {names[id(m)]: (m, {}) for m in unit_modules}
    for places in owners.values():
        unit_names = {unit_name for _, unit_name, _ in places}
        unit_name = unit_names.pop() if len(unit_names) == 1 else ""  # shared between units: the root's
        groups[unit_name][1][places[0][0]] = [owner for _, _, owner in places]
    return groups


def _make_buckets(
    unit_name: str, params: dict[str, list[_Owner]], world: World, precision: Precision
) -> list[Bucket]:
    """Group a unit's parameters by (storage dtype, wire dtype, trainable?) and replace them by sharded ones.

    Real parameters are copied into the shards; meta parameters wait for `ShardedModel.load`.
    """
    grouped: dict[tuple[torch.dtype, torch.dtype, bool], dict[str, nn.Parameter]] = {}
    real: dict[str, Tensor] = {}
    for name, owners in params.items():
        module, local_name = owners[0]
        old = module.get_parameter(local_name)
        if not old.is_meta:
            real[name] = old.detach().reshape(-1)
        wire_dtype = precision.wire_dtype if old.dtype.is_floating_point else old.dtype  # packed bytes are never cast
        storage_dtype = precision.master_dtype if old.requires_grad else wire_dtype
        # Real memory comes from the bucket; this only carries shape, dtype and identity.
        placeholder = torch.empty((), dtype=wire_dtype, device=world.device).expand(old.shape)
        new = nn.Parameter(placeholder, requires_grad=old.requires_grad)
        for owner, owner_name in owners:
            owner.register_parameter(owner_name, new)
        grouped.setdefault((storage_dtype, wire_dtype, old.requires_grad), {})[name] = new
    buckets = []
    for (storage_dtype, wire_dtype, trainable), members in grouped.items():
        kind = "trainable" if trainable else "frozen"
        name = f"{unit_name or 'root'}:{kind}:{str(wire_dtype).removeprefix('torch.')}"
        bucket = Bucket(name, members, storage_dtype, wire_dtype, trainable, world)
        assert len(real.keys() & members.keys()) in (0, len(members)), f"{name}: some parameters are meta, some are not"
        if members.keys() <= real.keys():
            bucket.load(lambda name, start, stop: real[name][start:stop])
        buckets.append(bucket)
    return buckets


def _slot_bytes(buckets: list[Bucket]) -> int:
    return sum(aligned(bucket.full_bytes) for bucket in buckets)
