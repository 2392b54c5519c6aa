"""Bytes of activations: what a block keeps from its forward to its backward, and what its backward needs beside that.

T tokens of b bytes an element; D hidden_size, Q = heads · head_dim, K = kv_heads · head_dim, F intermediate_size, r the
ranks of updates. An operation of minift saves its inputs where a gradient is made of them, and nothing else, so what is
kept is a list of tensors (`keeps`), each there only if somebody in backward asks for it:

    x         b·T·D    input of the block: the first norm reads it again       (4·T more: 1 / rms)
    normed    b·T·D    input of q, k, v                                        made again under `selective`
    qkv       b·T·(Q + 2·K)   queries and keys, turned, and values: attention's inputs
    out       b·T·Q    attention's result, input of o; 4·T·heads: log-sum-exp
    x_mid     b·T·D    input of the second norm                                (4·T more)
    normed_2  b·T·D    input of gate and up                                    made again under `selective`
    gate, up  b·T·2·F  inputs of silu(gate) · up
    product   b·T·F    its result, input of down                               made again under `selective`
    hidden    b·T·r    what the A of an update makes, in each of the four calls (minift/model/low_rank.py)
    method             of each call, what its method keeps beside that (methods.py); its result, too, where that is not
                       kept under another name

The sum for a block that trains in full is the table in minift/recompute.py; Korthikanti et al. 2022 (arXiv 2205.05198),
eq. 1, is its ancestor, 34·T·D + 5·T²·heads without attention of this kind. Backward frees what it has used as it goes
and makes gradients of activations: `backward_needs` walks through it and says how much there is at its fullest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from minift.model.config import ModelConfig
from minift.ops.nf4_linear import slice_width
from minift.planner.shapes import ProjectionShape, RunShape, UnitShape

RANDOM_STATE_BYTES = 5056
"""The CPU generator's, which a recomputed block keeps (`recompute._random_state`)."""


@dataclass(frozen=True)
class Call:
    """Projections that read one input in one operation (`model.linear.project`)."""

    projections: tuple[ProjectionShape, ...]

    @property
    def in_features(self) -> int:
        return self.projections[0].in_features

    @property
    def out_features(self) -> int:
        return sum(p.out_features for p in self.projections)

    @property
    def reads_input(self) -> bool:
        """Whether its backward makes a gradient of its input: of W or of A."""
        return any(p.trains_weight or p.updates or p.method.keeps_input for p in self.projections)

    @property
    def trains(self) -> bool:
        return self.reads_input or any(p.trains_bias or p.method.trains for p in self.projections)

    @property
    def rank(self) -> int:
        return sum(update.rank for p in self.projections for update in p.updates)

    @property
    def is_opaque(self) -> bool:
        """Whether it is no `project` but a forward of its own."""
        return any(p.method.is_opaque for p in self.projections)

    @property
    def drops(self) -> bool:
        return any(update.dropout for p in self.projections for update in p.updates)


@dataclass
class BlockActivations:
    """Of one decoder block of `run`; needs_dx: whether anything before it trains."""

    run: RunShape
    unit: UnitShape
    needs_dx: bool
    kept: dict[str, int] = field(init=False)  # with recompute policy none, by the names above
    needs_dout: bool = field(init=False)  # whether anything in it or before it trains

    def __post_init__(self) -> None:
        by_name = {p.name.rpartition(".")[2]: p for p in self.unit.projections}
        self.qkv = Call(tuple(by_name[name] for name in ("q_proj", "k_proj", "v_proj")))
        self.o = Call((by_name["o_proj"],))
        self.gate_up = Call((by_name["gate_proj"], by_name["up_proj"]))
        self.down = Call((by_name["down_proj"],))
        self.trained = {p.name.removeprefix(f"{self.unit.name}.") for p in self.unit.parameters if p.trainable}
        self.kept = dict(self._keeps())

    # Sizes #

    @property
    def model(self) -> ModelConfig:
        return self.run.model

    def _bytes(self, features: int) -> int:
        """Of an activation with so many features a token."""
        return self.run.wire_itemsize * self.run.block_tokens * features

    def _statistics(self, count: int) -> int:
        """fp32 numbers, so many a token."""
        return 4 * self.run.block_tokens * count

    @property
    def hidden(self) -> int:
        return self._bytes(self.model.hidden_size)

    @property
    def inner(self) -> int:
        return self._bytes(self.model.intermediate_size)

    @property
    def queries(self) -> int:
        return self._bytes(self.model.num_heads * self.model.head_dim)

    @property
    def keys(self) -> int:
        return self._bytes(self.model.num_kv_heads * self.model.head_dim)

    @property
    def prefix_keys(self) -> int:
        return self.run.wire_itemsize * self.run.num_prefix * self.model.num_kv_heads * self.model.head_dim

    # Kept #

    def _keeps(self) -> Iterator[tuple[str, int]]:
        """Follow `model.block.Block.forward`: an operation saves something if its result needs a gradient."""
        heads, kv_heads = self.model.num_heads, self.model.num_kv_heads
        needs = self.needs_dx or "input_layernorm.weight" in self.trained
        if needs:
            yield "x", self.hidden + self._statistics(1)
        yield from self._call("normed", self.qkv, self.hidden)
        needs = needs or self.qkv.trains
        qk_norm_trains = self.model.qk_norm and bool(
            self.trained & {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
        )
        if self.model.qk_norm and (needs or qk_norm_trains):
            yield "before_norm", self.queries + self.keys + self._statistics(heads + kv_heads)
        needs = needs or qk_norm_trains or self.run.num_prefix > 0
        if needs:
            # A prefix makes copies of keys and values, behind itself; what they are copies of nobody reads again.
            yield "turned", self.queries + (0 if self.run.num_prefix else self.keys)
            yield "values", 2 * (self.keys + self.prefix_keys) if self.run.num_prefix else self.keys
            yield "lse", self._statistics(heads)
        if needs or self.o.reads_input:
            yield "out", self.queries
        yield from self._call("", self.o, 0)
        needs = needs or self.o.trains or self.needs_dx
        self.needs_dx_mid = needs
        if needs or "post_attention_layernorm.weight" in self.trained:
            yield "x_mid", self.hidden + self._statistics(1)
            needs = True
        yield from self._call("normed_2", self.gate_up, self.hidden)
        needs = needs or self.gate_up.trains
        self.needs_dproduct = needs
        if needs:
            yield "gate_up", 2 * self.inner
        yield from self._call("product", self.down, self.inner)
        self.needs_dout = needs or self.down.trains

    def _call(self, name: str, call: Call, num_bytes: int) -> Iterator[tuple[str, int]]:
        if name and call.reads_input:
            yield name, num_bytes
        if call.rank:
            yield f"hidden of {call.projections[0].name}", self._bytes(call.rank)
        features = sum(p.method.other_features for p in call.projections)
        features += sum(p.out_features for p in call.projections if self._is_kept_for_method(p))
        if features:
            yield f"method of {call.projections[0].name}", int(self._bytes(1) * features)

    def _is_kept_for_method(self, projection: ProjectionShape) -> bool:
        """Its result. Those of v, gate and up are kept in any case, and those of q and k if they have norms."""
        name = projection.name.rpartition(".")[2]
        read_later = ("v_proj", "gate_proj", "up_proj") + (("q_proj", "k_proj") if self.model.qk_norm else ())
        return projection.method.keeps_output and name not in read_later

    def kept_bytes(self) -> int:
        """From forward to backward, under the block's own policy (minift/recompute.py has it as a table)."""
        if not self.needs_dout:
            return 0
        if self.unit.recompute == "full" or (self.unit.recompute == "offload" and not self.run.is_on_gpu):
            return self.hidden + RANDOM_STATE_BYTES
        if self.unit.recompute == "offload":
            return 0
        return sum(self.kept.values()) - self.made_again()

    def made_again(self) -> int:
        """Of what `none` keeps, what `selective` makes again; what that is made from is kept instead, if it would not
        be kept anyway."""
        if self.unit.recompute != "selective":
            return 0
        sources = {
            "normed": ("x", self.hidden),
            "normed_2": ("x_mid", self.hidden),
            "product": ("gate_up", 2 * self.inner),
        }
        saved = sum(
            self.kept[name] - (0 if source in self.kept else num_bytes)
            for name, (source, num_bytes) in sources.items()
            if name in self.kept
        )
        return saved + (self.kept.get("turned", 0) if self.model.qk_norm else 0)

    # Backward #

    def backward_needs(self) -> dict[str, int]:
        """At its fullest, beside what was kept before it began: {"recompute", "backward", "workspace"}.

        With `full` and `offload`, the block first runs again: what `none` keeps. Then, whatever the policy, the moments
        of `_moments`: something kept is freed, something new is there.
        """
        if not self.needs_dout:
            return {}
        again = 0
        if self.unit.recompute in ("full", "offload"):
            again = sum(self.kept.values())
            if "x" in self.kept:  # which is there already, but for its statistics
                again -= self.hidden
            if self.unit.recompute == "offload" and self.run.is_on_gpu:
                again += 2 * self.hidden  # this one and the next, on its way
        moments = [
            {"recompute": again + remade - freed, "backward": self.hidden + made, "workspace": workspace}
            for freed, remade, made, workspace in self._moments()
        ]
        return max(moments, key=lambda moment: sum(moment.values()))

    def _moments(self) -> Iterator[tuple[int, int, int, int]]:
        """(freed so far of what is kept, made again, gradients and temporaries, workspace), beside dout, b·T·D, which
        is alive throughout: it is the gradient of x_mid's residual path, too."""
        is_selective = self.unit.recompute == "selective"

        def kept(*names: str) -> int:
            return sum(self.kept.get(name, 0) for name in names)

        def remade(*names: str) -> int:
            return kept(*names) if is_selective else 0

        def freed(*names: str) -> int:
            return 0 if is_selective else kept(*names)

        yield 0, remade("product"), *self._product_needs(self.down, self.needs_dproduct)
        if not self.needs_dproduct:
            return
        # In one operation with down, the gradient of gate has the place of that of the product.
        gone = freed("product")
        if self.down.is_opaque:
            gone += kept(*self._own(self.down))
        yield gone, 0, (3 if self.down.is_opaque else 2) * self.inner, 0
        gone += kept("gate_up")
        made, workspace = self._product_needs(self.gate_up, "x_mid" in self.kept)
        yield gone, remade("normed_2"), 2 * self.inner + made, workspace
        if not self.needs_dx_mid:
            return
        gone += freed("normed_2") + kept("x_mid", *self._own(self.gate_up))
        yield gone, 0, *self._product_needs(self.o, "lse" in self.kept)
        if "lse" not in self.kept:
            return
        gone += kept(*self._own(self.o))
        turned = remade("turned") if self.model.qk_norm else 0
        yield gone, turned, 2 * self.queries + 2 * self.keys, self.attention_workspace_bytes()
        gone += kept("values", "lse", "out") + (0 if is_selective and self.model.qk_norm else kept("turned"))
        made, workspace = self._product_needs(self.qkv, "x" in self.kept)
        yield gone, remade("normed"), self.queries + 2 * self.keys + made, workspace

    @staticmethod
    def _own(call: Call) -> tuple[str, str]:
        """Names of what is kept for this call alone."""
        return f"hidden of {call.projections[0].name}", f"method of {call.projections[0].name}"

    def _product_needs(self, call: Call, needs_dx: bool) -> tuple[int, int]:
        """(gradients and temporaries, workspace) of one call's backward at its fullest, beside its douts.

        A gradient of W that its slot cannot add up itself passes through a temporary. dropout: x with its zeros; then
        the product with A, and that with its zeros, beside the sum of earlier ones.
        """
        x, ranks = self._bytes(call.in_features), self._bytes(call.rank)
        # A method makes the gradient of the sum of W x and the updates from that of its result.
        ranks += sum(self._bytes(p.out_features) for p in call.projections if p.method.trains)
        seen = x if call.drops else 0
        converted = [p.weight_numel * self.run.wire_itemsize for p in call.projections if p.trains_weight]
        of_weights = max(converted, default=0) if self._must_convert() else 0
        if not needs_dx:
            return max(of_weights, seen) + ranks, 0
        scratch = max((self.slice_bytes(p) for p in call.projections if p.block_size), default=0)
        num_updates = sum(len(p.updates) for p in call.projections)
        others = max(of_weights, seen, 2 * seen + (seen if num_updates > 1 else 0))
        return (x + ranks, scratch) if x + scratch > others else (others + ranks, 0)

    def slice_bytes(self, projection: ProjectionShape) -> int:
        """Of a weight in NF4, as many columns as are dequantised at a time (minift/ops/nf4_linear.py)."""
        column_bytes = projection.out_features * self.run.wire_itemsize
        if projection.in_features % projection.block_size:
            return projection.in_features * column_bytes
        columns = slice_width(projection.in_features, projection.block_size, column_bytes, self.run.is_on_gpu)
        return columns * column_bytes

    def _must_convert(self) -> bool:
        """Whether gradients are computed in another dtype than that in which they wait for their reduction."""
        return any(not self.run.adds_products_up_in(b.slot_itemsize) for b in self.unit.buckets if b.trainable)

    def attention_workspace_bytes(self) -> int:
        """Backward of attention. CPU: documents of 1024 keys and more are cut into up to 4 chunks of 512, each with its
        part of dq in fp32, of which the later ones are seen by ever fewer queries (csrc/cpu/attention.cpp). GPU: dq is
        added up in fp32 (Dao 2023, arXiv 2307.08691)."""
        width = self.model.num_heads * self.model.head_dim
        work = self.run.workload
        if self.run.is_on_gpu:
            return 4 * work.tokens * width
        chunks = min(4, work.document_tokens // 512)
        if chunks < 2:
            return 0
        # Chunk c begins where (1 - begin / keys)² = 1 - c / chunks, and is seen by the queries after its beginning.
        seen = sum(math.sqrt(1 - c / chunks) for c in range(chunks))
        return int(4 * work.tokens * width * seen)
