"""Bytes of activations: what a block keeps from its forward to its backward.

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
eq. 1, is its ancestor, 34·T·D + 5·T²·heads without attention of this kind. What a block needs beside that while it runs
is in `block_peaks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from minift.model.config import ModelConfig
from minift.planner.shapes import ProjectionShape, RunShape, UnitShape

RANDOM_STATE_BYTES = 5056
"""The CPU generator's, which a recomputed block keeps (`recompute._random_state`)."""


@dataclass(frozen=True)
class Call:
    """Projections that read one input in one operation (`model.project.project`)."""

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

    def features_bytes(self, features: int) -> int:
        """Of an activation with so many features a token."""
        return self.run.wire_itemsize * self.run.block_tokens * features

    def _statistics(self, count: int) -> int:
        """fp32 numbers, so many a token."""
        return 4 * self.run.block_tokens * count

    @property
    def hidden(self) -> int:
        return self.features_bytes(self.model.hidden_size)

    @property
    def inner(self) -> int:
        return self.features_bytes(self.model.intermediate_size)

    @property
    def queries(self) -> int:
        return self.features_bytes(self.model.num_heads * self.model.head_dim)

    @property
    def keys(self) -> int:
        return self.features_bytes(self.model.num_kv_heads * self.model.head_dim)

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
            yield f"hidden of {call.projections[0].name}", self.features_bytes(call.rank)
        features = sum(p.method.other_features for p in call.projections)
        features += sum(p.out_features for p in call.projections if self.is_kept_for_method(p))
        if features:
            yield f"method of {call.projections[0].name}", int(self.features_bytes(1) * features)

    def is_kept_for_method(self, projection: ProjectionShape) -> bool:
        """Its result. Those of v, gate and up are kept in any case, and those of q and k if they have norms."""
        name = projection.name.rpartition(".")[2]
        read_later = ("v_proj", "gate_proj", "up_proj") + (("q_proj", "k_proj") if self.model.qk_norm else ())
        return projection.method.keeps_output and name not in read_later

    def saved(self) -> dict[str, int]:
        """What its forward leaves for backward under the block's own policy (minift/recompute.py has it as a table),
        but for the input of a block that runs again."""
        if self.runs_again:
            return {}
        saved = dict(self.kept)
        if self.unit.recompute == "selective":
            made_of = {
                "normed": ("x", self.hidden),
                "normed_2": ("x_mid", self.hidden),
                "product": ("gate_up", 2 * self.inner),
            }
            if self.model.qk_norm and "turned" in saved:
                made_of["turned"] = ("before_norm", saved["turned"])
            for name, (source, num_bytes) in made_of.items():
                if saved.pop(name, None):
                    saved.setdefault(source, num_bytes)
        return saved

    @property
    def runs_again(self) -> bool:
        return self.unit.recompute in ("full", "offload")

    @property
    def sends_input_away(self) -> bool:
        """Whether it waits for backward on the host of a GPU."""
        return self.needs_dout and self.unit.recompute == "offload" and self.run.is_on_gpu

    @property
    def keeps_input(self) -> bool:
        """Whether its input stays on the device until backward."""
        if self.runs_again:
            return self.needs_dout and not self.sends_input_away
        return "x" in self.saved()

    def kept_bytes(self) -> int:
        """From forward to backward."""
        if self.runs_again:
            return self.hidden + RANDOM_STATE_BYTES if self.keeps_input else 0
        return sum(self.saved().values())
