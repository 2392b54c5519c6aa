"""What one rank computes in a step: the operations of every unit, forward, again, and backward.

    step = count(run)                 of a `shapes.RunShape`
    step.units[1].backward            operations (`op.Op`) of a block's backward, in one microbatch

Counted from shapes alone, rule by rule as the modules have it: `model/project.py` and `low_rank.py` (products),
`model/block.py` (the rest of a block), `objectives/cross_entropy.py` (the head, whose gradients come in its forward),
`recompute.py`. With T tokens, P weights in projections, no biases:

    forward    2 T P + 4 E H pairs       backward   2 T P for dx, 2 T P for dW of trained weights, 10 E H pairs
    LoRA       forward 2 T Σ r (in + out), backward twice that
    NF4        every product with the weight dequantises it first: the same FLOPs, and bytes

A gradient that nobody needs is not computed: what lies below the first trained weight has no backward, and the first
one that is reached no gradient of its input. Both follow from which tensors require a gradient, as in autograd.

Not counted: Python, index arithmetic, and operations on less than a row a token. Not here: seconds (`device`), the
order of things (`simulate`), what is sent and updated (`exchange`). Adapters that have a forward of their own count as
LoRA of their rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minift.objectives.cross_entropy import default_chunk_tokens
from minift.ops.low_rank import reads_wide_once
from minift.ops.nf4_linear import GPU_SLICE_BYTES, SLICE_BYTES
from minift.ops.updated_swiglu import makes_updates
from minift.planner.exchange import DTYPE_OF_SIZE, Exchange, exchange_of
from minift.planner.head import is_claimed_in_fp32
from minift.planner.op import (
    Op,
    attention,
    both_of_dy,
    cast,
    dequantize,
    elementwise,
    product,
    total_flops,
    updated_swiglu,
    visible_pairs,
)
from minift.planner.shapes import ProjectionShape, RunShape, UnitShape


@dataclass(frozen=True)
class UnitWork:
    """One unit in one microbatch. The root's forward and backward are those of its embedding; `head` are norm, head and
    loss.

    exchange: what it sends and stores, and its updates. has_backward, ends_with_input: see `costs.SimUnit`.
    input_bytes: of its input, if that waits for backward in host memory, beyond a bus.
    """

    name: str
    forward: tuple[Op, ...]
    recompute: tuple[Op, ...]
    backward: tuple[Op, ...]
    exchange: Exchange
    has_backward: bool
    ends_with_input: bool
    input_bytes: int = 0
    forward_head: tuple[Op, ...] = ()
    backward_head: tuple[Op, ...] = ()


@dataclass(frozen=True)
class StepWork:
    """A step of one rank: `microbatches` times its units, then the updates."""

    units: tuple[UnitWork, ...]
    microbatches: int

    @property
    def flops(self) -> float:
        """Of matrix products and attention, what is computed again included."""
        return self.microbatches * sum(
            total_flops(u.forward + u.forward_head + u.recompute + u.backward + u.backward_head) for u in self.units
        )

    @property
    def model_flops(self) -> float:
        """Without what is computed again, and with attention's backward at twice its forward: what model FLOP
        utilisation counts, see performance.md, 4.2."""
        again = self.microbatches * sum(total_flops(u.recompute) for u in self.units)
        attention_backward = self.microbatches * sum(
            total_flops(op for op in u.backward if op.kind == "attention backward") for u in self.units
        )
        return self.flops - again - attention_backward / 5


def count(run: RunShape) -> StepWork:
    """The step of `run`."""
    root = _Root(run)
    needs_grad = run.trains_before_blocks
    blocks = []
    for layer, unit in enumerate(run.blocks):
        block = _Block(run, unit, layer, needs_grad)
        blocks.append(block)
        needs_grad = block.out_needs
    works = [root.work(needs_grad)] + [block.work() for block in blocks]
    return StepWork(tuple(works), run.workload.microbatches)


# Projections #


class _Projections:
    """Some that read the same x: `model.project.project`. needs_dx: whether x needs a gradient. A method that trains
    more than updates is counted as passes over its result, there and back."""

    def __init__(self, run: RunShape, unit: UnitShape, names: Sequence[str], tokens: int, needs_dx: bool) -> None:
        self.members = [p for p in unit.projections if p.name.rpartition(".")[2] in names]
        self.tokens, self.needs_dx = tokens, needs_dx
        self.dtype = run.precision.wire
        self.run, self.unit = run, unit
        self.slice_bytes = GPU_SLICE_BYTES if run.is_on_gpu else SLICE_BYTES
        self.out_needs = needs_dx or any(
            p.trains_weight or p.trains_bias or p.updates or p.method.trains for p in self.members
        )
        ranks = [update for p in self.members for update in p.updates]
        self.rank = sum(update.rank for update in ranks)
        self.share_x = all(update.dropout == 0 for update in ranks)
        self.reads_x = self.rank > 0 or any(p.trains_weight for p in self.members)

    def ranks(self) -> list[list[int]]:
        """Those of each projection's updates."""
        return [[update.rank for update in p.updates] for p in self.members]

    def forward(self, result_is_read: bool = True, defers: bool = False) -> list[Op]:
        """result_is_read, defers: see `model.project`."""
        ops: list[Op] = []
        T, dtype = self.tokens, self.dtype
        result_is_read = result_is_read or any(p.method.is_opaque or p.method.has_after for p in self.members)
        for p in self.members if result_is_read else ():
            ops += self._stored(p, "linear", T, p.in_features, p.out_features)
            if p.has_bias and p.storage == "nf4" and not p.updates:
                ops.append(elementwise("add", dtype, T * p.out_features, 2))
        if self.rank:
            in_features = self.members[0].in_features
            if self.share_x:
                ops.append(product("x A", dtype, T, in_features, self.rank))
        for p in self.members:
            for update in p.updates:
                if not self.share_x:
                    ops += self._dropped(p, update.dropout)
                    ops.append(product("x A", dtype, T, p.in_features, update.rank))
                if result_is_read and not defers:
                    ops.append(product("h B", dtype, T, update.rank, p.out_features))
        return ops + [elementwise("add", dtype, T * p.out_features, 3) for p in self.members if p.method.trains]

    def backward(self, defers_dx: bool = False) -> list[Op]:
        if not self.out_needs:
            return []
        T, dtype = self.tokens, self.dtype
        ops = [elementwise("add", dtype, T * p.out_features, 5) for p in self.members if p.method.trains]
        for p in self.members:
            if p.trains_weight:
                ops.append(product("weight gradient", dtype, p.out_features, T, p.in_features))
                ops += self._into_slot(p.weight_numel)
            if p.trains_bias:
                ops.append(elementwise("sum", dtype, T * p.out_features, 1))
        of_B = [(p.out_features, update.rank) for p in self.members for update in p.updates]
        at_once = reads_wide_once(of_B, self.run.precision.wire_dtype, self.run.is_on_gpu)
        for out_features, rank in of_B:
            if at_once:
                ops.append(both_of_dy(dtype, T, out_features, rank))
            else:
                ops.append(product("dy h", dtype, out_features, T, rank))
                ops.append(product("dy B", dtype, T, out_features, rank))
        if self.rank and self.share_x:
            ops.append(product("g x", dtype, self.rank, T, self.members[0].in_features))
        elif self.rank:
            for p in self.members:
                for update in p.updates:
                    ops += self._dropped(p, update.dropout)
                    ops.append(product("g x", dtype, update.rank, T, p.in_features))
        if self.needs_dx:
            for p in self.members:
                ops += self._stored(p, "input gradient", T, p.out_features, p.in_features)
            ops += [] if defers_dx else self._update_dx()
        return ops

    def _update_dx(self) -> list[Op]:
        if not self.rank:
            return []
        T, dtype, in_features = self.tokens, self.dtype, self.members[0].in_features
        if self.share_x:
            return [product("g A", dtype, T, self.rank, in_features)]
        ops = []
        for p in self.members:
            for update in p.updates:
                ops.append(product("g A", dtype, T, update.rank, p.in_features))
                ops += self._dropped(p, update.dropout)
                ops.append(elementwise("add", dtype, T * p.in_features, 3))
        return ops

    def _dropped(self, p: ProjectionShape, dropout: float) -> list[Op]:
        return [elementwise("dropout", self.dtype, self.tokens * p.in_features, 2)] if dropout else []

    def _stored(self, p: ProjectionShape, kind: str, m: int, k: int, n: int) -> list[Op]:
        """A product with the stored weight; of NF4, in slices of it: `ops/nf4_linear.py`."""
        if p.storage == "dense":
            return [product(kind, self.dtype, m, k, n)]
        slices = max(1, round(p.weight_numel * (2 if self.dtype != "float32" else 4) / self.slice_bytes))
        names = (parameter.name for bucket in self.unit.buckets for parameter in bucket.parameters)
        is_nested = any(name.startswith(f"{p.name}.") and name.endswith(".nested") for name in names)
        weight = dequantize(
            self.dtype, p.weight_numel / slices, p.block_size, is_nested, kind == "input gradient", slices
        )
        return [weight, product(kind, self.dtype, m, k, -(-n // slices), slices)]

    def _into_slot(self, numel: int) -> list[Op]:
        """A product that its slot cannot add up itself goes there by way of a temporary: `grad_slot.py`."""
        if self.run.adds_products_up_in(self.unit.slot_itemsize):
            return []
        return [cast(self.dtype, DTYPE_OF_SIZE[self.unit.slot_itemsize], numel)]


# Blocks #


class _Block:
    """`model/block.py`."""

    def __init__(self, run: RunShape, unit: UnitShape, layer: int, x_needs: bool) -> None:
        self.run, self.unit = run, unit
        config, T, dtype = run.model, run.block_tokens, run.precision.wire
        D, E = config.hidden_size, config.head_dim
        H, K, F = config.num_heads, config.num_kv_heads, config.intermediate_size
        trains = {p.name.rpartition(".")[0].rpartition(".")[2] for p in unit.parameters if p.trainable}

        def projections(names: Sequence[str], x_needs: bool) -> _Projections:
            return _Projections(run, unit, names, T, x_needs)

        self.x_needs = x_needs
        is_sent_away = unit.recompute == "offload" and run.is_on_gpu
        self.input_bytes = T * D * _size(dtype) if is_sent_away else 0
        norm_needs = x_needs or "input_layernorm" in trains
        qkv = projections(("q_proj", "k_proj", "v_proj"), norm_needs)
        self.mixes = qkv.out_needs or run.num_prefix > 0 or bool({"q_norm", "k_norm"} & trains)
        o = projections(("o_proj",), self.mixes)
        middle_needs = x_needs or o.out_needs
        second_norm_needs = middle_needs or "post_attention_layernorm" in trains
        gate_up = projections(("gate_proj", "up_proj"), second_norm_needs)
        down = projections(("down_proj",), gate_up.out_needs)
        self.out_needs = middle_needs or down.out_needs

        pairs = visible_pairs(run.workload.lengths, config.sliding_windows[layer])
        pairs += (run.num_prompt + run.num_prefix) * run.workload.tokens + visible_pairs([run.num_prompt], None)
        attend, attend_backward = attention(dtype, T, pairs, H, K, E)
        norm = elementwise("rms norm", dtype, T * D, 2)

        def norm_backward(adds: bool) -> Op:
            """adds: the gradient of the residual, in the same pass."""
            return elementwise("rms norm backward", dtype, T * D, 4 if adds else 3)

        turn = [elementwise("rope", dtype, T * heads * E, 2) for heads in (H, K)]
        head_norms = [elementwise("rms norm", dtype, T * heads * E, 2) for heads in (H, K)] if config.qk_norm else []
        head_norms_backward = (
            [elementwise("rms norm backward", dtype, T * heads * E, 3) for heads in (H, K)] if config.qk_norm else []
        )
        is_opaque = any(p.method.is_opaque for p in down.members)
        remakes = unit.recompute == "selective" and gate_up.out_needs and not is_opaque and down.reads_x
        gated = elementwise("swiglu", dtype, T * F, 3)
        gated_backward = elementwise("swiglu backward", dtype, T * F, 6 if remakes else 5)

        def makes(call: _Projections) -> bool:
            """Whether silu · up makes the updates in this call: `ops.updated_swiglu`."""
            return makes_updates(F, call.ranks(), run.precision.wire_dtype, run.is_on_gpu)

        knows = not is_opaque and not any(p.method.is_opaque or p.method.has_after for p in gate_up.members)
        defers = knows and gate_up.rank > 0 and makes(gate_up)
        defers_dx = defers and down.share_x and makes(down)
        if defers:
            ranks = gate_up.rank + down.rank * defers_dx
            gated = updated_swiglu("updated swiglu", dtype, T, F, gate_up.rank, 3)
            gated_backward = updated_swiglu("updated swiglu backward", dtype, T, F, ranks, 6 if remakes else 5)
        add = elementwise("add", dtype, T * D, 3)
        gated_again = [gated] if is_opaque or (down.reads_x and not remakes) else []
        self.cheap = [norm, norm, *gated_again, *((*head_norms, *turn) if config.qk_norm else ())]
        before_down = [
            norm, *qkv.forward(), *head_norms, *turn, attend, *o.forward(), add, norm,
            *gate_up.forward(defers=defers), gated,
        ]  # fmt: skip
        self.forward = [*before_down, *down.forward(), add]
        self.rerun = [*before_down, *down.forward(result_is_read=False), add]
        self.backward = [
            *down.backward(defers_dx),
            *([gated_backward] if gate_up.out_needs else []),
            *gate_up.backward(),
            *([norm_backward(middle_needs)] if second_norm_needs else []),
            *o.backward(),
            *([attend_backward, *turn, *head_norms_backward] if self.mixes else []),
            *qkv.backward(),
            *([norm_backward(x_needs)] if norm_needs else []),
        ]

    def work(self) -> UnitWork:
        recompute = {"none": [], "selective": self.cheap}.get(self.unit.recompute, self.rerun)
        return UnitWork(
            self.unit.name,
            tuple(self.forward),
            tuple(recompute) if self.out_needs else (),
            tuple(self.backward) if self.out_needs else (),
            exchange_of(self.run, self.unit),
            has_backward=self.out_needs,
            ends_with_input=self.x_needs,
            input_bytes=self.input_bytes if self.out_needs else 0,
        )


# The root #


class _Root:
    """Embedding, last norm, head and loss."""

    def __init__(self, run: RunShape) -> None:
        self.run = run

    def work(self, hidden_needs: bool) -> UnitWork:
        """hidden_needs: whether what comes out of the last block needs a gradient."""
        run, root = self.run, self.run.root
        config, T, dtype = run.model, run.block_tokens, run.precision.wire
        D, V, M = config.hidden_size, config.vocab_size, run.workload.num_targets
        trains = {p.name for p in root.parameters if p.trainable}
        norm_needs = hidden_needs or any(name.endswith("norm.weight") for name in trains)
        size = _size(dtype)
        head = _Projections(run, root, ("lm_head",), M, norm_needs)
        is_dense = not head.rank
        head_weight = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        trains_head = head_weight in trains
        forward = [
            elementwise("rms norm", dtype, T * D, 2),
            elementwise("copy", dtype, M * D, 2),
            *head.forward(),
            *([] if is_dense else [elementwise("copy", dtype, M * V, 2)]),
            elementwise("softmax", dtype, M * V, 2),
        ]
        if norm_needs or trains_head or head.rank:
            forward += head.backward()
        if trains_head and not run.adds_products_up_in(4) and M > default_chunk_tokens(V, size, False, True):
            forward.append(cast(dtype, "float32", V * D))  # several chunks are added up in fp32
        backward = []
        if norm_needs:
            backward = [
                *_scaled(dtype, M * D),
                elementwise("copy", dtype, (T + 2 * M) * D, 1),
                elementwise("rms norm backward", dtype, T * D, 3),
            ]
        if trains_head:
            backward += _scaled("float32" if is_claimed_in_fp32(run) else dtype, V * D)
        return UnitWork(
            "",
            (elementwise("embedding", dtype, T * D, 2),),
            (),
            tuple(self._embedding_backward()) if run.trains_before_blocks and not run.num_prompt else (),
            exchange_of(run, root),
            has_backward=True,
            ends_with_input=False,
            forward_head=tuple(forward),
            backward_head=tuple(backward),
        )

    def _embedding_backward(self) -> list[Op]:
        """Rows are added to the slot, which is zero before unless the head has written all of it. On a GPU one of 16
        bits gets the whole gradient instead, by way of a temporary: `GradSlot.add_repeated_rows`."""
        run, dtype = self.run, self.run.precision.wire
        D, numel = run.model.hidden_size, run.model.vocab_size * run.model.hidden_size
        slot_dtype = DTYPE_OF_SIZE[run.root.slot_itemsize]
        is_tied = run.model.tie_word_embeddings
        rows = elementwise("embedding backward", dtype, run.block_tokens * D, 2)
        if run.is_on_gpu and slot_dtype != "float32":
            into_slot = elementwise("add", slot_dtype, numel, 3) if is_tied else cast(dtype, slot_dtype, numel)
            return [elementwise("copy", dtype, numel, 1), rows, into_slot]
        return [rows] if is_tied else [elementwise("copy", slot_dtype, numel, 1), rows]


def _scaled(dtype: str, elements: int) -> list[Op]:
    """A gradient times a number, formed in fp32: `objectives.cross_entropy._scale_into`."""
    times = elementwise("scale", "float32", elements, 2)
    if dtype == "float32":
        return [times]
    return [cast(dtype, "float32", elements), times, cast("float32", dtype, elements)]


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
