"""Bytes that one rank holds: between steps, at every moment of a step, and where the peak is.

    plan = plan_memory(run)         # of shapes.RunShape
    plan.peak_bytes, plan.peak.name # 3.1e9, "backward of model.layers.29"
    plan.categories()               # {"weights": ..., "optimizer state": ..., ...} at the peak

What is there all the time is the engine's (closed form in minift/fsdp/sharded.py, after ZeRO: Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.1) and the optimizer's:

    weights               Σ F/N · storage itemsize; resident F · wire itemsize, and no gathered form beside it; and
                          Σ F/N · 2 of fp32 masters whose upper halves these are
    quantization scales   the part of the NF4 bytes that are no codes
    gradients             Σ_trainable F/N · 4, or F · 4 where microbatches are added up before they are reduced; on a
                          GPU from a unit's first backward in a step (of the root: forward) to the update
    optimizer state       fp32: 8 bytes an element of a trainable shard; 8bit: 2.03, small parameters 8 more
    gathered buffers      rings · largest block, and what is kept beyond its forward
    reduce buffers        2 · largest block and the root, where gradients are computed; paired sends: staging

A step adds activations (`activations.py`, `block_peaks.py`) and the head of the loss (`head.py`), moment by moment:
`_moments`.

Ranks that share memory (`fsdp/shared_memory.py`) have gathered buffers and resident weights once per host: a rank
counts for 1/N of them. What lies on the host of a GPU (offloaded shards and inputs of blocks, paged moments), or on a
CPU in a file (paged moments), is apart: `host`. Not counted: CUDA's context (0.5 GB) and what its allocator keeps for
later, of a CPU's products in 16 bits oneDNN's scratch memory (0.1 to 2 MB a thread) and what is prepared for them
(`heap.py`: 40 MB, and 20 MB for every further thread that multiplies), the interpreter, the data set.

Checked against every byte that PyTorch hands out in a step, on a CPU: tests/planner/test_memory.py draws two dozen
configurations in each run. On an H100 peaks were 0.1 to 0.9 % above the plan (benchmarks/results/NOTES.md); there,
operations that csrc has no kernel for need fp32 temporaries that are not in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minift.ops.blockwise import BLOCK
from minift.optim.memory import PAGED_BUFFER_BYTES
from minift.optim.moments import is_small
from minift.planner.activations import BlockActivations
from minift.planner.block_peaks import backward_needs, forward_needs
from minift.planner.head import head_backward_bytes, head_bytes, tied_head_grad_bytes
from minift.planner.shapes import BucketShape, ParameterShape, RunShape

PERSISTENT = (
    "weights", "quantization scales", "gradients", "optimizer state", "gathered buffers", "reduce buffers",
)  # fmt: skip
TRANSIENT = ("activations", "recompute", "backward", "LM head", "workspace")


@dataclass(frozen=True)
class Moment:
    """One moment of a step and the bytes of it, by category, beside what is there all the time."""

    name: str
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryPlan:
    """persistent: by category. moments: of a step, in their order. host: by category, what is elsewhere."""

    persistent: dict[str, int]
    moments: tuple[Moment, ...]
    host: dict[str, int]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total_bytes)

    @property
    def persistent_bytes(self) -> int:
        return sum(self.persistent.values())

    @property
    def peak_bytes(self) -> int:
        return self.persistent_bytes + self.peak.total_bytes

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def categories(self) -> dict[str, int]:
        """What the peak is made of."""
        always, then = self.persistent, self.peak.bytes
        return {name: always.get(name, 0) + then.get(name, 0) for name in (*PERSISTENT, *TRANSIENT)}


def plan_memory(run: RunShape) -> MemoryPlan:
    persistent, host = persistent_bytes(run)
    inputs = sum(_pinned_bytes(block.hidden) for block in block_activations(run) if block.sends_input_away)
    return MemoryPlan(persistent, tuple(_moments(run)), host | ({"activations": inputs} if inputs else {}))


def _pinned_bytes(num_bytes: int) -> int:
    """What PyTorch takes of host memory for a tensor that a GPU reads there: a power of two."""
    return 1 << (num_bytes - 1).bit_length()


# Between steps #


def persistent_bytes(run: RunShape) -> tuple[dict[str, int], dict[str, int]]:
    """What a rank holds between steps, and what of it lies on the host of its GPU."""
    device = dict.fromkeys(PERSISTENT, 0)
    host: dict[str, int] = {}
    for bucket in run.buckets:
        is_offloaded = bucket.is_offloaded and run.is_on_gpu
        shards = host if is_offloaded else device
        weights, scales = _stored_bytes(bucket, run)
        _add(shards, "weights", weights)
        _add(shards, "quantization scales", scales)
        if bucket.trainable:
            _add(shards, "gradients", 0 if _makes_grads_anew(run) else _grad_bytes(bucket, run))
            _add(host if is_offloaded or run.optim.paged else device, "optimizer state", moment_bytes(bucket, run))
    _add(host if run.host_updates else device, "gradients", run.scratch_bytes)
    for ring in {r.key: r for unit in run.units for r in (unit.gather_ring, unit.reduce_ring)}.values():
        is_gather = any(unit.gather_ring.key == ring.key for unit in run.units)
        size = ring.count * ring.buffer_bytes
        if is_gather:
            _add(device, "gathered buffers", size // run.shard_size if run.shares_memory else size)
        else:
            _add(device, "reduce buffers", size + _staging_bytes(size, run))
    if run.optim.paged and run.is_on_gpu and not run.host_updates:
        _add(device, "optimizer state", PAGED_BUFFER_BYTES)
    return device, host


def _add(where: dict[str, int], category: str, num_bytes: int) -> None:
    where[category] = where.get(category, 0) + num_bytes


def _stored_bytes(bucket: BucketShape, run: RunShape) -> tuple[int, int]:
    """(weights, quantization scales) of a rank's shard, or of what is resident: of all of it, or of its share."""
    is_whole = bucket.resident and not run.shares_memory
    total = bucket.storage_itemsize * (bucket.full_numel if is_whole else bucket.shard_numel)
    total += bucket.lower_itemsize * bucket.shard_numel
    local_numel = bucket.local_numel
    scales = sum(
        p.numel if is_whole else local_numel.get(p.name, 0)
        for p in bucket.parameters
        if p.dtype == "uint8" and not p.name.endswith("codes")
    )
    return total - scales, scales


def _grad_bytes(bucket: BucketShape, run: RunShape) -> int:
    """fp32 sums. Blocks that are updated in backward take turns with scratch memory (fsdp.step_in_backward)."""
    if bucket.keeps_full_grads:
        return 4 * bucket.full_numel + _staging_bytes(4 * bucket.full_numel, run)
    takes_turns = run.policy.step_in_backward and bucket not in run.root.buckets
    return 0 if takes_turns else 4 * bucket.shard_numel


def moment_bytes(bucket: BucketShape, run: RunShape) -> int:
    """Both AdamW moments of a shard (minift/optim/moments.py)."""
    if run.optim.state == "fp32":
        return 8 * bucket.shard_numel
    small = sum(r.stop - r.start for r in bucket.ranges if is_small(r))
    return 2 * (bucket.shard_numel + 4 * -(-bucket.shard_numel // BLOCK)) + 8 * small


def _staging_bytes(num_bytes: int, run: RunShape) -> int:
    """Where what the others send of a reduce buffer arrives: all of it but the own chunk (paired sends only)."""
    if run.link != "paired sends" or run.shard_size == 1:
        return 0
    return num_bytes // run.shard_size * (run.shard_size - 1)


# In a step #


def _moments(run: RunShape) -> Iterator[Moment]:
    """Forward of every block, the head, its backward, backward of the blocks from the last to the first, the update."""
    blocks = block_activations(run)
    gradients = _GradientsInStep(run)
    always = batch_bytes(run)
    kept = always + rotary_bytes(run)
    embedded = run.wire_itemsize * run.block_tokens * run.model.hidden_size
    for block in blocks:
        needs = forward_needs(block)
        needs["activations"] += kept
        if block is not blocks[0] and not blocks[0].keeps_input:  # then it has no other owner than `CausalLM.forward`
            needs["activations"] += embedded
        yield Moment(f"forward of {block.unit.name}", needs | gradients.before_blocks())
        kept += block.kept_bytes()
    trains = blocks[-1].needs_dout if blocks else run.root.trains
    kept += _final_norm_bytes(run, trains)
    held = gradients.before_blocks()
    yield Moment("head", {"activations": kept + embedded} | head_bytes(run, trains) | held)
    yield Moment("backward of head", {"activations": kept} | head_backward_bytes(run, trains) | held)
    kept += tied_head_grad_bytes(run) - _final_norm_bytes(run, trains)
    for number, block in reversed(list(enumerate(blocks))):
        if block.needs_dout:
            needs = {"activations": kept} | backward_needs(block) | gradients.in_backward_of(number)
            yield Moment(f"backward of {block.unit.name}", needs)
        kept -= block.kept_bytes()
    if run.is_on_gpu and (embedding := _trained_embedding(run)):
        added = _embedding_backward_bytes(run, embedding)
        needs = {"activations": kept + embedded, "backward": added} | gradients.after_blocks()
        yield Moment("backward of embedding", needs)
    yield Moment("optimizer", {"activations": always} | gradients.in_update())


def _makes_grads_anew(run: RunShape) -> bool:
    """Whether gradients have memory from backward to update only (`fsdp.bucket.are_grads_made_anew`)."""
    return run.is_on_gpu and not run.host_updates


class _GradientsInStep:
    """Gradients, at moments of the last microbatch, that are not there all the time. Whole ones, that are kept, get
    memory when the backward of their unit begins, of the root when its forward does; the shards of others when it ends.
    Earlier microbatches have left all of them."""

    def __init__(self, run: RunShape) -> None:
        units = run.units if _makes_grads_anew(run) else ()
        sizes = [sum(_grad_bytes(b, run) for b in unit.buckets if b.trainable) for unit in units]
        self._root, self._blocks = (sizes[0], sizes[1:]) if units else (0, [0] * len(run.blocks))
        self._begins_with_all = run.workload.microbatches > 1
        self._is_whole = any(b.keeps_full_grads for b in run.buckets)

    def before_blocks(self) -> dict[str, int]:
        return self._of(len(self._blocks))

    def in_backward_of(self, number: int) -> dict[str, int]:
        return self._of(number if self._is_whole else number + 1)

    def after_blocks(self) -> dict[str, int]:
        return self._of(0)

    def in_update(self) -> dict[str, int]:
        return {"gradients": self._root + sum(self._blocks)}

    def _of(self, first: int) -> dict[str, int]:
        """Of blocks from number `first` on."""
        if self._begins_with_all:
            return self.in_update()
        return {"gradients": sum(self._blocks[first:]) + (self._root if self._is_whole else 0)}


def _trained_embedding(run: RunShape) -> ParameterShape | None:
    weights = (p for p in run.root.parameters if p.trainable and p.name.endswith("embed_tokens.weight"))
    return next(weights, None)


def _embedding_backward_bytes(run: RunShape, embedding: ParameterShape) -> int:
    """What a GPU makes of the gradient of the embedded tokens: the same in fp32, if the slot to which it is added has
    that and the wire has not; for a slot of 16 bits, a gradient of the whole table (`GradSlot.add_repeated_rows`).
    Not counted: the tokens in order, some 40 bytes each."""
    if run.root.slot_itemsize < 4:
        return embedding.numel * run.wire_itemsize
    return 0 if run.wire_itemsize == 4 else 4 * run.block_tokens * run.model.hidden_size


def block_activations(run: RunShape) -> list[BlockActivations]:
    needs_dx = run.trains_before_blocks
    blocks = []
    for unit in run.blocks:
        blocks.append(BlockActivations(run, unit, needs_dx))
        needs_dx = blocks[-1].needs_dout
    return blocks


def batch_bytes(run: RunShape) -> int:
    """Tokens, positions and targets, int64, of all microbatches of a step; on a GPU of one."""
    count = 1 if run.is_on_gpu else run.workload.microbatches
    return 24 * run.workload.tokens * count


def rotary_bytes(run: RunShape) -> int:
    """Cosines and sines, fp32, of half a head each; kept for the backward of rotations."""
    return 4 * run.block_tokens * run.model.head_dim


def _final_norm_bytes(run: RunShape, trains: bool) -> int:
    """The input of the last norm, and 4 bytes a token."""
    norm_trains = any(p.trainable for p in run.root.parameters if p.name.endswith("norm.weight"))
    return run.block_tokens * (run.wire_itemsize * run.model.hidden_size + 4) if trains or norm_trains else 0
