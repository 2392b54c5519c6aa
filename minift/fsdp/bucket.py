"""One bucket: the parameters of a unit that share (storage dtype, wire dtype, trainable?), as one flat tensor.

While its unit is not gathered, a parameter is an expanded NaN scalar: it keeps its shape, dtype and identity, holds no
memory, and using it out of turn gives NaN instead of a plausible number.

Bytes held by a bucket on each of N ranks, with F = full_numel (see `flat`):

    storage shard   F/N · storage itemsize    always; of a *resident* bucket it lies in the gathered tensor itself
    lower halves    F/N · 2                   fp32 masters with a bf16 wire: the storage shard has the upper ones, bf16
    gathered        F · wire itemsize         borrowed from a buffer while the unit is FULL; always, if resident
    gradients       F/N · 4                   trainable only: the fp32 sum over ranks and microbatches
      while they are computed, F · (wire itemsize, or reduce itemsize if the transport adds in the dtype it sends),
      borrowed from a buffer; or, where the policy adds up microbatches before it reduces, F · 4 instead of both.
      On a GPU from a step's first backward of the unit (of the root: forward) to `clear_grads`; else always

A bucket is resident if gathering would only copy what all ranks can see already: storage and wire dtype are the same
(all but fp32 masters with an fp16 wire, and bf16 ones with another wire), and there is one rank, or the transport
shares memory between ranks and has room. Then N ranks hold one copy together, 1/N each, and yet nothing has to be
gathered. A rank updates its part of it when all have reduced their gradients, so have read it in backward for the last
time; they meet before they read it again (`ShardedModel.weights_changed`), and around a forward that comes in between.
Frozen buckets of a strategy that keeps weights gathered are resident too, whatever the transport: gathered once, when
they are loaded.

So a step casts no weights: of fp32 masters with a bf16 wire, the half that is sent is stored for itself
(`ops/halves.py`), also where they are offloaded. Only other pairs of dtypes are cast, on their way into a buffer.

No schedule here: see `unit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.dist.process import World
from minift.fsdp.flat import FlatLayout
from minift.fsdp.transport import PIECE_ELEMENTS, Buffer, NoRoomError, Transport
from minift.grad_slot import GradSlot, lay_slot, slot_of
from minift.ops.blockwise import BLOCK
from minift.ops.halves import read_weights, write_weights_
from minift.optim.shard import FlatShard
from minift.pinned import pinned_zeros


@dataclass(frozen=True)
class Dtypes:
    """storage: of the shard. wire: of the gathered parameters. grad: of gradients on their way to the reduction.
    has_lower: the shard has the upper halves of fp32 masters, and there are lower ones beside it."""

    storage: torch.dtype
    wire: torch.dtype
    grad: torch.dtype
    has_lower: bool = False

    @property
    def weights(self) -> torch.dtype:
        """Of what is stored, lower halves included."""
        return torch.float32 if self.has_lower else self.storage


class Bucket:
    """The shard, the gathered views and the gradients of one flat group of parameters."""

    def __init__(
        self,
        name: str,
        params: dict[str, nn.Parameter],
        dtypes: Dtypes,
        trainable: bool,
        transport: Transport,
        *,
        keeps_full_grads: bool,
        stays_gathered: bool,
        offload: bool,
    ) -> None:
        self.name = name
        self.params = params
        self.dtypes = dtypes
        self.trainable = trainable
        self.world: World = transport.world
        shapes = {n: p.shape for n, p in params.items()}
        block = BLOCK if trainable else 1  # optimizer states may be quantised by blocks
        self.layout = FlatLayout.plan(shapes, self.world.size, dtypes.wire.itemsize, block)
        self.arrived: set[str] = set()
        """Parameters that a backward has given a gradient since the beginning."""
        all_see_it = self.world.size == 1 or transport.shares_memory or (stays_gathered and not trainable)
        self.resident = dtypes.storage == dtypes.wire and all_see_it and not offload
        self._resident_buffer: Buffer | None = None
        self._transport = transport
        self.offload = offload  # stored in host memory
        self._views: dict[int, list[Tensor]] = {}  # buffer address -> one view per parameter
        self._placeholders = [_placeholder(p.shape, dtypes.wire, self.world.device) for p in params.values()]
        self._full: Tensor | None = None  # 1-D, wire dtype, while gathering or gathered
        self.shard = self._make_shard()  # 1-D, storage dtype
        self.lower = torch.zeros_like(self.shard, dtype=torch.int16) if dtypes.has_lower else None
        self.grad: Tensor | None = None  # 1-D fp32, shard_numel; while it has memory: `have_grads`
        self._grads_stay = offload or not are_grads_made_anew(self.world.device)
        self.grad_is_empty = True  # nothing was added up since `clear_grads`: overwrite instead of adding
        self._slots: list[GradSlot] = []
        self._full_grad: Tensor | None = None  # 1-D, full_numel
        self.kept_buffer: Buffer | None = None  # where the full gradient lies, if it is kept
        self._flat_shard: FlatShard | None = None
        self.keeps_full_grads = keeps_full_grads and trainable
        if trainable:
            for parameter_name, parameter in params.items():
                parameter.register_post_accumulate_grad_hook(_into_slot_of(parameter_name))

    def _make_shard(self) -> Tensor:
        """Zeros, because padding is gathered and summed into norms along with everything else."""
        numel, dtype = self.layout.shard_numel, self.dtypes.storage
        if self.resident:
            try:
                (self._resident_buffer,) = self._transport.gather_buffers(1, self.layout.full_numel * dtype.itemsize)
            except NoRoomError:
                self.resident = False
            else:
                self._full = self._resident_buffer.memory.view(dtype)
                self.expose()
                return self.layout.chunk(self._full, self.world.rank).zero_()
        self.hide()
        if self.offload:
            return host_zeros(numel, dtype, self.world.device)
        return torch.zeros(numel, dtype=dtype, device=self.world.device)

    @property
    def gather_bytes(self) -> int:
        """Bytes this bucket needs in a gather buffer."""
        return 0 if self.resident else self.layout.full_numel * self.dtypes.wire.itemsize

    @property
    def reduce_bytes(self) -> int:
        """Bytes this bucket needs in a reduce buffer."""
        borrows = self.trainable and not self.keeps_full_grads
        return self.layout.full_numel * self.dtypes.grad.itemsize if borrows else 0

    def move_out(self) -> None:
        """Be resident no longer: the own shard gets memory of its own, and the others' are gathered."""
        assert self.resident
        own = self.shard
        self.resident, self._resident_buffer, self._views = False, None, {}
        self.hide()
        self.shard = own.clone()

    def forget_grads(self) -> None:
        """All that `make_grads` made."""
        self._flat_shard = self.grad = self._full_grad = self.kept_buffer = None
        self._slots = []

    # Gathering #

    def place(self, memory: Tensor) -> Tensor:
        """Take `memory` (1-D uint8, gather_bytes long), copy the own shard to its place, return the full tensor."""
        self._full = memory.view(self.dtypes.wire)
        own = self.layout.chunk(self._full, self.world.rank)
        if self.dtypes.storage == self.dtypes.wire or own.device == self.shard.device:
            own.copy_(self.shard, non_blocking=True)
        else:  # offloaded masters are brought to the device and cast there
            for place, piece in zip(own.split(PIECE_ELEMENTS), self.shard.split(PIECE_ELEMENTS), strict=True):
                place.copy_(piece.to(own.device, non_blocking=True))
        return self._full

    @property
    def is_updated_in_place(self) -> bool:
        """Whether an optimizer writes where other ranks that share this memory read."""
        return self.trainable and self.resident

    def expose(self) -> None:
        """Make the parameters views of the gathered memory. Views are made once per buffer, not once per gather."""
        assert self._full is not None, f"{self.name}: expose() before place()"
        address = self._full.data_ptr()
        if address not in self._views:
            self._views[address] = self.layout.views(self._full)
        for parameter, view in zip(self.params.values(), self._views[address], strict=True):
            parameter.data = view

    def hide(self) -> None:
        """Let go of the gathered memory; the parameters become placeholders."""
        if self.resident:
            return
        self._full = None
        for parameter, placeholder in zip(self.params.values(), self._placeholders, strict=True):
            parameter.data = placeholder

    # Gradients #

    def use_scratch(self, scratch: Tensor) -> None:
        """From now on gradients are added up in the beginning of `scratch` (1-D fp32)."""
        self._grads_stay = True
        self._set_grad(scratch[: self.layout.shard_numel])

    def make_grads(self, scratch: Tensor | None) -> None:
        """Say what an optimizer updates. scratch: see `use_scratch`."""
        ranges = self.layout.local_ranges(self.world.rank)
        self._flat_shard = FlatShard(self.name, self.shard, None, ranges, self.lower)
        if scratch is not None:
            self.use_scratch(scratch)
        elif self._grads_stay:
            self.have_grads()

    def have_grads(self) -> None:
        """Allocate what gradients are added up in, unless there is such memory. On the stream that will free it, after
        it has waited for whoever used it."""
        if self.grad is not None:
            return
        numel = self.layout.shard_numel
        if self.keeps_full_grads:
            (self.kept_buffer,) = self._transport.reduce_buffers(1, self.layout.full_numel * 4)
            self.kept_buffer.acquire()
            self._full_grad = self.kept_buffer.memory.view(torch.float32)
            for part in [slice(None)] if self._grads_stay else self.layout.gaps():
                self._full_grad[part].zero_()
            self._slots = [GradSlot(view) for view in self.layout.views(self._full_grad)]
            self._set_grad(self.layout.chunk(self._full_grad, self.world.rank))
        elif self.offload:
            self._set_grad(host_zeros(numel, torch.float32, self.world.device))
        else:
            make = torch.zeros if self._grads_stay else torch.empty  # the first reduction overwrites all of it
            self._set_grad(make(numel, dtype=torch.float32, device=self.world.device))

    def _set_grad(self, grad: Tensor | None) -> None:
        self.grad = self.flat_shard().grad = grad

    def open_slots(self, memory: Tensor | None) -> None:
        """Lay a slot on every parameter: in `memory` (1-D uint8, reduce_bytes long), or in the gradients kept."""
        if self.keeps_full_grads:
            self.have_grads()
        else:
            assert memory is not None
            self._full_grad = memory.view(self.dtypes.grad)
            for gap in self.layout.gaps():  # the memory still holds another unit's values
                self._full_grad[gap].zero_()
            self._slots = [GradSlot(view) for view in self.layout.views(self._full_grad)]
        for parameter, slot in zip(self.params.values(), self._slots, strict=True):
            lay_slot(parameter, slot)

    def close_slots(self) -> Tensor:
        """Take the slots away and return the full gradient; what got none is zero."""
        assert self._full_grad is not None
        for (name, parameter), slot in zip(self.params.items(), self._slots, strict=True):
            lay_slot(parameter, None)
            if slot.close():
                self.arrived.add(name)
        return self._full_grad

    def clear_grads(self) -> None:
        """Forget the gradients: their memory, or that it is not empty, so that the next ones overwrite them."""
        if self.kept_buffer is not None and not self.grad_is_empty:
            self.kept_buffer.release()
            self.kept_buffer.acquire()  # the other ranks have read what they needed of it
        self.grad_is_empty = True
        for slot in self._slots:
            slot.clear()
        for parameter in self.params.values():  # also of one that got its gradient elsewhere, before there were slots
            lay_slot(parameter, None)
            parameter.grad = None
        if not self._grads_stay:
            self.kept_buffer = self._full_grad = None
            self._slots = []
            self._set_grad(None)

    # Storage #

    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Fill the shard: `read(name, start, stop)` gives elements [start, stop) of the flattened parameter."""
        for r in self.layout.local_ranges(self.world.rank):
            here = slice(r.start, r.stop)
            lower = None if self.lower is None else self.lower[here]
            write_weights_(self.shard[here], lower, read(r.name, r.param_start, r.param_start + r.stop - r.start))

    def complete(self) -> None:
        """After `load`, if resident in memory of this rank only: gather what the others have loaded. Collective."""
        if self.resident and not self._transport.shares_memory:
            self._transport.all_gather(self._resident_buffer, [self._full]).wait()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the *weights as they are stored* (fp32 masters, both halves) and yield (name, tensor). Collective.

        Holds one temporary of full_numel of them; the yielded tensors are views of it, valid until the next.
        A copy also of what is resident: other ranks may go on, and update that, before this one has used it.
        """
        dtype = self.dtypes.weights
        (buffer,) = self._transport.gather_buffers(1, self.layout.full_numel * dtype.itemsize)
        buffer.acquire()
        full = buffer.memory.view(dtype)
        read_weights(self.shard, self.lower, out=self.layout.chunk(full, self.world.rank))
        self._transport.all_gather(buffer, [full]).wait()
        for span, view in zip(self.layout.spans, self.layout.views(full), strict=True):
            yield span.name, view

    def flat_shard(self) -> FlatShard:
        """What the optimizer updates: master, gradient, and which elements belong to which parameter."""
        assert self._flat_shard is not None, f"{self.name} is frozen"
        return self._flat_shard


def are_grads_made_anew(device: torch.device) -> bool:
    """Whether gradients get memory in each step and give it back. On a GPU, where PyTorch's allocator has it at hand,
    they do: it is what activations lay in before. On a CPU they would get fresh pages, which cost more than they save;
    and in the host memory of a GPU, pinned ones."""
    return device.type == "cuda"


def _into_slot_of(name: str) -> Callable[[Tensor], None]:
    """Moves an ordinary `.grad` to where gradients are reduced, as soon as autograd has finished it."""

    def into_slot(parameter: Tensor) -> None:
        if parameter.grad is None:  # the function has put it there itself
            return
        slot = slot_of(parameter)
        if slot is None:
            raise RuntimeError(
                f"{name} got a gradient outside of the backward of its unit, where nothing would reduce it; use the "
                "parameter inside of the forward of the module that it belongs to"
            )
        slot.add(parameter.grad)
        parameter.grad = None

    return into_slot


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `shape` that owns one element: NaN, or 0 for packed integer formats (which have no NaN)."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(shape)


def host_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1-D, where offloaded tensors of `device` lie. The meta device, on which models are planned, is its own host."""
    return pinned_zeros(numel, dtype) if device.type == "cuda" else torch.zeros(numel, dtype=dtype, device=device)
