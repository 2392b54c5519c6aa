"""A model cut into shards, and what a trainer may do with it. The engine sees modules and tensors only.

Memory per rank, in bytes, beside activations (closed form; `held_bytes()` reports the parts). Sums over buckets, whose
F = full_numel; s, w, g: itemsizes of storage, wire and gradients; N: ranks of the shard axis:

    shards     Σ F/N · s                                                      resident buckets: inside of `gathered`
               Σ F/N · 2 of fp32 masters whose upper halves these are         resident or not
    gathered   zero3: (1 + prefetch) · max_blocks Σ F·w  +  Σ_kept blocks F·w  +  root F·w
               others: Σ F·w           resident buckets need F·w each always and no buffer
    gradients  zero2, zero3: Σ_trainable F/N · 4  +  2 · max_blocks Σ F·g  +  root F·g
               others, and N = 1: Σ_trainable F·4       on a GPU, what is a sum is there from backward to update
               step_in_backward, any N: instead of the sum, 2 · max_blocks Σ F/N · 4  +  root F/N · 4
    staging    paired sends only: (N-1)/N of the reduce buffers

The block buffers of zero3 are never more than there are blocks. With shared memory the N ranks hold `gathered` once
together, not once each; everything else is per rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minift.dist.mesh import make_mesh
from minift.dist.process import World
from minift.fsdp.assign import Group, assign_parameters
from minift.fsdp.bucket import Bucket, Dtypes, host_zeros
from minift.fsdp.hooks import Hooks
from minift.fsdp.policy import ShardPolicy
from minift.fsdp.shared_memory import SharedMemory
from minift.fsdp.streams import Lane
from minift.fsdp.transport import NcclTransport, NoRoomError, PairedSends, Transport
from minift.fsdp.unit import REDUCTIONS_IN_FLIGHT, Keep, Links, Ring, Unit, aligned
from minift.optim.shard import FlatShard
from minift.precision import Precision
from minift.trace import Recorder


def connect(world: World) -> Transport:
    """The fastest transport that works between the ranks of `world`. Collective."""
    if world.size == 1:
        return Transport(world)
    if world.device.type == "cuda":
        return NcclTransport(world)
    return SharedMemory.connect(world) or PairedSends(world)


class ShardedModel:
    """Handle of a sharded model. The module itself is used as before: call it, call backward on its loss."""

    def __init__(
        self,
        module: nn.Module,
        unit_modules: list[nn.Module],
        world: World,
        policy: ShardPolicy,
        precision: Precision,
        recorder: Recorder,
        connect: Callable[[World], Transport] = connect,
    ) -> None:
        self.module = module
        self.policy = policy
        self.mesh = make_mesh(world, policy.shard_size(world.size))
        gather = connect(self.mesh.shard)
        reduce = gather if self.mesh.reduce is self.mesh.shard else connect(self.mesh.reduce)
        lanes = Lane(world.device), Lane(world.device)
        self._links = Links(gather, reduce, self.mesh.replica, *lanes, recorder)
        groups = assign_parameters(module, unit_modules)
        buckets = {group.name: self._make_buckets(group, precision) for group in groups}
        self.units = self._make_units_in_room(groups, buckets)
        self._has_live_weights = any(bucket.is_updated_in_place for bucket in self.buckets)
        """Whether updates of one rank may be seen by others at once, so that they must not read meanwhile."""
        self.hooks = Hooks(self.units, policy.prefetch_units, recorder, self._meet_around_update)
        self._share_loaded()

    @property
    def world(self) -> World:
        """All ranks."""
        return self.mesh.world

    @property
    def shard_world(self) -> World:
        """The ranks among which this rank's copy of the model is cut up."""
        return self.mesh.shard

    @property
    def replica_world(self) -> World:
        """The ranks that hold the same shard as this one."""
        return self.mesh.replica

    @property
    def shares_memory(self) -> bool:
        """Whether the ranks of `shard_world` have gathered weights together, once."""
        return self._links.gather.shares_memory

    @property
    def buckets(self) -> Iterator[Bucket]:
        for unit in self.units:
            yield from unit.buckets

    # Weights #

    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill every shard. `read(name, start, stop)` returns elements [start, stop) of the flattened parameter `name`
        (any float dtype); it is asked only for what this rank keeps. Collective."""
        self._meet()
        for bucket in self.buckets:
            bucket.load(read)
        self.hooks.free_updated()
        self._share_loaded()

    def weights_changed(self) -> None:
        """To be called after masters were written: by an optimizer, from a checkpoint; after each, not after both.
        Collective.

        Masters may be written when a backward has ended that completed the gradients of the step, or at the start: then
        no rank is reading them.
        """
        self.hooks.free_updated()
        self._meet_around_update()

    def full_tensors(self, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) as stored, halves put together, one bucket in memory at a time. Collective: all
        ranks iterate."""
        for bucket in self.buckets:
            if bucket.trainable or not trainable_only:
                yield from bucket.full_tensors()

    # Gradients #

    def trainable_shards(self) -> list[FlatShard]:
        """One flat shard per trainable bucket: what an optimizer, a norm or a checkpoint works on. On a GPU they have
        gradients from the last backward of a step to `clear_gradients`."""
        return [bucket.flat_shard() for bucket in self.buckets if bucket.trainable]

    def expect_microbatch(self, is_last: bool) -> None:
        """Say before each forward whether its backward completes the gradients of the step. (Yes, unless told
        otherwise.)

        What is summed up once a step is summed up then: zero1, ddp, and replicas."""
        self.hooks.is_last_microbatch = is_last

    def clear_gradients(self) -> None:
        """The step is over: the next gradients start from zero. Writes nothing."""
        for unit in self.units:
            unit.clear_gradients()

    def update_in_backward(self, update: Callable[[FlatShard], None]) -> None:
        """From now on call `update` on each shard as soon as its gradient is complete (policy.step_in_backward)."""
        self.hooks.on_reduced = lambda buckets: [update(bucket.flat_shard()) for bucket in buckets]

    def parameters_without_grad(self) -> list[str]:
        """Trainable parameters that no backward has reached yet (their gradient counts as zero)."""
        return sorted(name for b in self.buckets if b.trainable for name in b.params.keys() - b.arrived)

    def reset(self) -> None:
        """Return to the state between steps after an exception in forward or backward: nothing gathered, no gradient.

        Every rank must have failed alike; a rank that failed alone leaves the others waiting in a collective. With
        policy.step_in_backward some weights may have been updated already, and stay so: go back to a checkpoint.
        """
        self.hooks.reset()
        self.clear_gradients()
        self.weights_changed()

    # Memory #

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank holds between and during steps, by the kinds of the module docstring (staging aside)."""
        rings = {id(ring): ring for unit in self.units for ring in (unit.gather_ring, unit.reduce_ring)}.values()
        held = {"shards": 0, "gathered": 0, "gradients": 0}
        for ring in rings:
            held[ring.kind] += len(ring.buffers) * ring.num_bytes
        for bucket in self.buckets:
            if bucket.resident:
                held["gathered"] += bucket.layout.full_numel * bucket.dtypes.wire.itemsize
            else:
                held["shards"] += bucket.shard.nbytes
            held["shards"] += 0 if bucket.lower is None else bucket.lower.nbytes
            if bucket.grad is not None and not _shares_storage(bucket.grad, self._scratch):
                held["gradients"] += 4 * (
                    bucket.layout.full_numel if bucket.keeps_full_grads else bucket.layout.shard_numel
                )
        return held | {"gradients": held["gradients"] + self._scratch.nbytes}

    @property
    def scratch_bytes(self) -> int:
        """Of the gradient shards that blocks take turns with (policy.step_in_backward)."""
        return self._scratch.nbytes

    def sent_bytes(self) -> int:
        """Bytes of weights and gradients that this rank has sent to others since the beginning: per step and bucket

            zero3 2 (N-1)/N F w, others (N-1)/N F w once a step; and (N-1)/N F g of gradients, whenever they are reduced

        (w of weights and g of gradients: itemsizes; the block that ends the forward is gathered once, and resident
        buckets never). Nothing is sent between ranks that share memory. The same on every rank.
        """
        transports = {id(link): link for link in (self._links.gather, self._links.reduce)}.values()
        return sum(link.sent_bytes for link in transports) + sum(unit.replica_sent_bytes for unit in self.units)

    # Assembly #

    def _make_buckets(self, group: Group, precision: Precision) -> list[Bucket]:
        """Group a unit's parameters by (dtypes, trainable?) and replace them by sharded ones.

        Real parameters are copied into the shards; meta parameters wait for `load`.
        """
        transport = self._links.gather
        grouped: dict[tuple[Dtypes, bool], dict[str, nn.Parameter]] = {}
        real: dict[str, Tensor] = {}
        for name, places in group.params.items():
            old = places[0].module.get_parameter(places[0].local_name)
            if not old.is_meta:
                real[name] = old.detach().reshape(-1)
            wire = precision.wire_dtype if old.dtype.is_floating_point else old.dtype  # packed bytes are never cast
            dtypes = Dtypes(
                storage=precision.storage_dtype if old.requires_grad else wire,
                wire=wire,
                # Sums in fp32 need no fp32 addends; what was computed in the wire dtype loses nothing by staying in it.
                grad=wire if self._links.reduce.sums_in_fp32 else precision.reduce_dtype,
                has_lower=old.requires_grad and precision.has_halves,
            )
            # Real memory comes from the bucket; this only carries shape, dtype and identity.
            placeholder = torch.empty((), dtype=wire, device=self.world.device).expand(old.shape)
            new = nn.Parameter(placeholder, requires_grad=old.requires_grad)
            for place in places:
                place.module.register_parameter(place.local_name, new)
            grouped.setdefault((dtypes, old.requires_grad), {})[name] = new
        buckets = []
        for (dtypes, trainable), params in grouped.items():
            kind = "trainable" if trainable else "frozen"
            name = f"{group.name or '(root)'}:{kind}:{str(dtypes.wire).removeprefix('torch.')}"
            bucket = Bucket(
                name,
                params,
                dtypes,
                trainable,
                transport,
                keeps_full_grads=self.policy.keeps_full_gradients(self.mesh.shard.size),
                stays_gathered=self.policy.keeps_until_update(),
                offload=self.policy.is_offloaded(group.name, trainable),
            )
            assert len(real.keys() & params.keys()) in (0, len(params)), f"{name}: some parameters are meta, not all"
            if params.keys() <= real.keys():
                bucket.load(lambda name, start, stop: real[name][start:stop])
            buckets.append(bucket)
        return buckets

    def _make_units_in_room(self, groups: list[Group], buckets: dict[str, list[Bucket]]) -> list[Unit]:
        """Resident buckets were there first. Where they left no memory to share for buffers, and later for an export,
        the largest of them lie in each rank's own memory instead, and are gathered."""
        everything = [bucket for members in buckets.values() for bucket in members]
        trained = (bucket for bucket in everything if bucket.trainable)
        largest_bytes = max((b.layout.full_numel * b.dtypes.weights.itemsize for b in trained), default=0)
        while True:
            resident = [bucket for bucket in everything if bucket.resident]
            units: list[Unit] = []  # those of the last attempt are gone, and their buffers with them
            try:
                units = self._make_units(groups, buckets)
                if resident and self.shares_memory:
                    self._links.gather.gather_buffers(1, largest_bytes)
                return units
            except NoRoomError:
                if not resident:
                    raise
                for bucket in everything:
                    bucket.forget_grads()
                max(resident, key=lambda bucket: bucket.layout.full_numel * bucket.dtypes.wire.itemsize).move_out()

    def _make_units(self, groups: list[Group], buckets: dict[str, list[Bucket]]) -> list[Unit]:
        keep: dict[str, Keep] = {}
        for group in groups:
            if self.policy.keeps_until_update():
                keep[group.name] = Keep.UNTIL_UPDATE
            elif group.name == "" or self.policy.keeps_until_backward(group.name):
                keep[group.name] = Keep.UNTIL_BACKWARD_ENDS
            else:
                keep[group.name] = Keep.UNTIL_FORWARD_ENDS
        blocks = [group.name for group in groups if group.name != ""]
        passing = [name for name in blocks if keep[name] is Keep.UNTIL_FORWARD_ENDS]
        for option, pattern in self.policy.patterns():
            if blocks and not any(re.search(pattern, name) for name in blocks):
                raise ValueError(
                    f"{option} has {pattern!r}, found in no name of the {len(blocks)} blocks, which "
                    f"are {blocks[0]} ... {blocks[-1]}"
                )
        for name in blocks:
            if self.policy.is_offloaded(name, trainable=False) and not self.policy.offload:
                self._check_offloaded(name, keep[name], buckets[name])
        shared = self._gather_ring(
            min(1 + self.policy.prefetch_units, len(passing)),
            max((_gather_bytes(buckets[n]) for n in passing), default=0),
        )
        reduce_bytes = {name: _reduce_bytes(members) for name, members in buckets.items()}
        reduced = [name for name in blocks if reduce_bytes[name]]
        self._make_grads([buckets[name] for name in blocks], buckets[""])
        scratch = self._scratch if self.policy.step_in_backward else None
        count = min(REDUCTIONS_IN_FLIGHT, len(reduced))
        block_reduce = self._reduce_ring(count, max((reduce_bytes[name] for name in reduced), default=0), scratch)
        root_reduce = self._reduce_ring(1, reduce_bytes[""])
        units = []
        for group in groups:
            own = keep[group.name] is not Keep.UNTIL_FORWARD_ENDS
            units.append(
                Unit(
                    group.name,
                    group.module,
                    buckets[group.name],
                    keep[group.name],
                    self._gather_ring(1, _gather_bytes(buckets[group.name])) if own else shared,
                    root_reduce if group.name == "" else block_reduce,
                    self._links,
                )
            )
        return units

    def _check_offloaded(self, name: str, keep: Keep, buckets: list[Bucket]) -> None:
        """ValueError unless this block, which fsdp.offload_frozen has chosen, gains by it."""
        chosen = f"fsdp.offload_frozen {list(self.policy.offload_frozen)} chooses block {name}"
        if keep is not Keep.UNTIL_FORWARD_ENDS:
            raise ValueError(
                f"{chosen}, which stays gathered from forward to backward, in device memory of its own; valid: blocks "
                "that fsdp.keep_gathered does not choose too, with fsdp.reshard_after_forward true"
            )
        if all(bucket.trainable for bucket in buckets):
            raise ValueError(f"{chosen}, which has no frozen weights; valid: blocks with some, or fsdp.offload")

    def _make_grads(self, blocks: list[list[Bucket]], root: list[Bucket]) -> None:
        """Gradient shards. When weights are updated in backward, blocks take turns with as many as can be under way:
        `_scratch`, (reductions in flight, largest block)."""
        self._scratch = torch.empty(0)
        if self.policy.step_in_backward:
            numel = max((sum(b.layout.shard_numel for b in block if b.trainable) for block in blocks), default=0)
            scratch_numel, device = REDUCTIONS_IN_FLIGHT * numel, self.world.device
            if self.policy.offload:
                scratch = host_zeros(scratch_numel, torch.float32, device)
            else:
                scratch = torch.empty(scratch_numel, dtype=torch.float32, device=device)
            self._scratch = scratch.view(REDUCTIONS_IN_FLIGHT, numel)
        for block in [*blocks, root]:
            for bucket in (b for b in block if b.trainable):
                takes_turns = self.policy.step_in_backward and block is not root
                bucket.make_grads(self._scratch[0] if takes_turns else None)

    def _gather_ring(self, count: int, num_bytes: int) -> Ring:
        buffers = self._links.gather.gather_buffers(count, num_bytes)
        return Ring("gathered", buffers, num_bytes, self._links.recorder)

    def _reduce_ring(self, count: int, num_bytes: int, scratch: Tensor | None = None) -> Ring:
        buffers = self._links.reduce.reduce_buffers(count, num_bytes)
        return Ring("gradients", buffers, num_bytes, self._links.recorder, scratch)

    def _meet_around_update(self) -> None:
        """Before and after updates are seen by other ranks that might be reading."""
        if self._has_live_weights:
            self._meet()

    def _share_loaded(self) -> None:
        """What was loaded into resident buckets becomes readable on all ranks."""
        for bucket in self.buckets:
            bucket.complete()
        self._meet()

    def _meet(self) -> None:
        """Resident buckets are read without being gathered: nobody may start before everybody has written."""
        if self._links.gather.shares_memory:
            self._links.gather.meet()


def _gather_bytes(buckets: list[Bucket]) -> int:
    return sum(aligned(bucket.gather_bytes) for bucket in buckets)


def _reduce_bytes(buckets: list[Bucket]) -> int:
    return sum(aligned(bucket.reduce_bytes) for bucket in buckets)


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
