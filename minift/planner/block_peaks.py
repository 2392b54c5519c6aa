"""Bytes that one decoder block needs at its fullest while it runs, forward and backward, beside what other blocks keep.

Both walk through the moments of `model.block.Block` and say what there is at each: activations by the names and sizes
of `activations.py`, results and gradients on their way, scratch memory of operations. What nobody keeps for backward is
there as long as a variable of a function that has not returned: a block's input in all of its forward, the result of a
norm in all of its branch, queries and keys, as projected, until attention's result is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from minift.ops.nf4_linear import slice_width
from minift.planner.activations import BlockActivations, Call
from minift.planner.shapes import ProjectionShape

# Forward #


def forward_needs(block: BlockActivations) -> dict[str, int]:
    """{"activations": with its input, "workspace"}."""
    return max(_forward_moments(block, block.saved()), key=lambda moment: sum(moment.values()))


def _forward_moments(
    block: BlockActivations, saved: dict[str, int], result_is_read: bool = True
) -> Iterator[dict[str, int]]:
    """saved: for backward. result_is_read: see `model.block.Block`; if not, the product with down is left out."""
    x, result = {"x": block.hidden}, block.hidden if result_is_read else 0
    of_mlp = {"x_mid", "normed_2", "gate_up", "product", *_own(block.gate_up), *_own(block.down)}
    saved_of_attention = {name: size for name, size in saved.items() if name not in of_mlp}

    def moment(saved: dict[str, int], variables: dict[str, int], others: int, workspace: int = 0) -> dict[str, int]:
        there = {name: max(saved.get(name, 0), variables.get(name, 0)) for name in saved | variables}
        return {"activations": sum(there.values()) + others, "workspace": workspace}

    projected = {"normed": block.hidden, "before_norm": block.queries + block.keys}
    if block.run.num_prefix:  # which makes copies of keys and values, behind itself
        turned = {"turned": block.queries, "values": 2 * (block.keys + block.prefix_keys)}
        projected["values as projected"] = block.keys
    else:
        turned = {"turned": block.queries + block.keys, "values": block.keys}
    attention = x | projected | turned | {"out": block.queries} | _narrow(block, block.o)
    yield moment(saved_of_attention, attention, block.hidden, _forward_slice_bytes(block, block.o))

    before_mlp = x | {"x_mid": block.hidden, "normed_2": block.hidden}
    if block.unit.recompute == "selective" and block.model.qk_norm:  # until it is known who reads what they make
        before_mlp["before_norm"] = projected["before_norm"]
    mlp = before_mlp | {"gate_up": 2 * block.inner, "product": block.inner} | _narrow(block, block.down)
    if block.down.drops:  # the product with its zeros, on its way into A
        yield moment(saved, mlp, block.inner)
    yield moment(saved, mlp, result, _forward_slice_bytes(block, block.down) if result_is_read else 0)
    yield moment(saved, before_mlp, result + block.hidden)  # which is added to x_mid


def _narrow(block: BlockActivations, call: Call) -> dict[str, int]:
    """What the A of its updates make."""
    return {_own(call)[0]: block.features_bytes(call.rank)} if call.rank else {}


def _own(call: Call) -> tuple[str, str]:
    """Names of what is kept for this call alone."""
    return f"hidden of {call.projections[0].name}", f"method of {call.projections[0].name}"


def _forward_slice_bytes(block: BlockActivations, call: Call) -> int:
    return max((_slice_of_rows_bytes(block, p) for p in call.projections if p.block_size), default=0)


def _slice_of_rows_bytes(block: BlockActivations, projection: ProjectionShape) -> int:
    """Of a weight in NF4, as many rows as are dequantised at a time (minift/ops/nf4_linear.py)."""
    row_bytes = projection.in_features * block.run.wire_itemsize
    unit = projection.block_size // math.gcd(projection.block_size, projection.in_features)
    return row_bytes * slice_width(projection.out_features, unit, row_bytes, block.run.is_on_gpu)


# Backward #


def backward_needs(block: BlockActivations) -> dict[str, int]:
    """Beside what was kept before it began: {"recompute", "backward", "workspace"}.

    With `full` and `offload` the block first runs again, and leaves what `none` keeps. Then, whatever the policy, the
    moments of `_backward_moments`: something kept is freed, something new is there.
    """
    if not block.needs_dout:
        return {}
    again, moments = 0, []
    if block.runs_again:
        # On a GPU `offload` has the input on its way from the host, and the next one.
        arriving = 0 if block.keeps_input else 2 * block.hidden
        again = arriving + sum(block.kept.values()) - (block.hidden if "x" in block.kept else 0)
        for moment in _forward_moments(block, block.kept, result_is_read=False):
            recompute = arriving + moment["activations"] - block.hidden
            moments.append({"recompute": recompute, "backward": block.hidden, "workspace": moment["workspace"]})
    for freed, remade, made, workspace in _backward_moments(block):
        recompute = again + remade - freed
        moments.append({"recompute": recompute, "backward": block.hidden + made, "workspace": workspace})
    return max(moments, key=lambda moment: sum(moment.values()))


def _backward_moments(block: BlockActivations) -> Iterator[tuple[int, int, int, int]]:
    """(freed so far of what is kept, made again, gradients and temporaries, workspace), beside dout, b·T·D, which is
    alive throughout: it is the gradient of x_mid's residual path, too."""
    is_selective = block.unit.recompute == "selective"

    def kept(*names: str) -> int:
        return sum(block.kept.get(name, 0) for name in names)

    def remade(*names: str) -> int:
        return kept(*names) if is_selective else 0

    def freed(*names: str) -> int:
        return 0 if is_selective else kept(*names)

    yield 0, remade("product"), *_product_needs(block, block.down, block.needs_dproduct)
    if not block.needs_dproduct:
        return
    # In one operation with down, the gradient of gate has the place of that of the product.
    gone = freed("product")
    if block.down.is_opaque:
        gone += kept(*_own(block.down))
    yield gone, 0, (3 if block.down.is_opaque else 2) * block.inner, 0
    gone += kept("gate_up")
    made, workspace = _product_needs(block, block.gate_up, "x_mid" in block.kept)
    yield gone, remade("normed_2"), 2 * block.inner + made, workspace
    if not block.needs_dx_mid:
        return
    gone += freed("normed_2") + kept("x_mid", *_own(block.gate_up))
    yield gone, 0, *_product_needs(block, block.o, "lse" in block.kept)
    if "lse" not in block.kept:
        return
    gone += kept(*_own(block.o))
    turned = remade("turned") if block.model.qk_norm else 0
    yield gone, turned, 2 * block.queries + 2 * block.keys, _attention_workspace_bytes(block)
    gone += kept("values", "lse", "out") + (0 if is_selective and block.model.qk_norm else kept("turned"))
    made, workspace = _product_needs(block, block.qkv, "x" in block.kept)
    yield gone, remade("normed"), block.queries + 2 * block.keys + made, workspace


def _product_needs(block: BlockActivations, call: Call, needs_dx: bool) -> tuple[int, int]:
    """(gradients and temporaries, workspace) of one call's backward at its fullest, beside its douts.

    A gradient of W that its slot cannot add up itself passes through a temporary. dropout: x with its zeros; then
    the product with A, and that with its zeros, beside the sum of earlier ones.
    """
    x, ranks = block.features_bytes(call.in_features), block.features_bytes(call.rank)
    # A method makes the gradient of the sum of W x and the updates from that of its result.
    ranks += sum(block.features_bytes(p.out_features) for p in call.projections if p.method.trains)
    seen = x if call.drops else 0
    converted = [p.weight_numel * block.run.wire_itemsize for p in call.projections if p.trains_weight]
    of_weights = max(converted, default=0) if _must_convert(block) else 0
    if not needs_dx:
        return max(of_weights, seen) + ranks, 0
    scratch = max((_slice_of_columns_bytes(block, p) for p in call.projections if p.block_size), default=0)
    num_updates = sum(len(p.updates) for p in call.projections)
    others = max(of_weights, seen, 2 * seen + (seen if num_updates > 1 else 0))
    return (x + ranks, scratch) if x + scratch > others else (others + ranks, 0)


def _slice_of_columns_bytes(block: BlockActivations, projection: ProjectionShape) -> int:
    """Of a weight in NF4, as many columns as are dequantised at a time (minift/ops/nf4_linear.py)."""
    column_bytes = projection.out_features * block.run.wire_itemsize
    if projection.in_features % projection.block_size:
        return projection.in_features * column_bytes
    columns = slice_width(projection.in_features, projection.block_size, column_bytes, block.run.is_on_gpu)
    return columns * column_bytes


def _must_convert(block: BlockActivations) -> bool:
    """Whether gradients are computed in another dtype than that in which they wait for their reduction."""
    return any(not block.run.adds_products_up_in(b.slot_itemsize) for b in block.unit.buckets if b.trainable)


def _attention_workspace_bytes(block: BlockActivations) -> int:
    """Backward of attention. CPU: documents of 1024 keys and more are cut into up to 4 chunks of 512, each with its
    part of dq in fp32, of which the later ones are seen by ever fewer queries (csrc/cpu/attention.cpp). GPU: dq is
    added up in fp32 (Dao 2023, arXiv 2307.08691)."""
    width = block.model.num_heads * block.model.head_dim
    work = block.run.workload
    if block.run.is_on_gpu:
        return 4 * work.tokens * width
    chunks = min(4, work.document_tokens // 512)
    if chunks < 2:
        return 0
    # Chunk c begins where (1 - begin / keys)² = 1 - c / chunks, and is seen by the queries after its beginning.
    seen = sum(math.sqrt(1 - c / chunks) for c in range(chunks))
    return int(4 * work.tokens * width * seen)
