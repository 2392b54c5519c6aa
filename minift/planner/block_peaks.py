"""Bytes that one decoder block needs at its fullest while it runs, forward and backward, beside what other blocks keep.

Both walk through the moments of `model.block.Block` and say what there is at each: activations by the names and sizes
of `activations.py`, results and gradients on their way, scratch memory of operations. What nobody keeps for backward is
there as long as a variable of a function that has not returned: a block's input in all of its forward, the result of a
norm in all of its branch, queries and keys, as projected, until attention's result is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from minift.grad_slot import ADD_BYTES
from minift.model.linear import rows_in_cache
from minift.ops.nf4_linear import slice_width
from minift.planner.activations import BlockActivations, Call
from minift.planner.shapes import ProjectionShape

_LANES, _KEYS = 192, 64  # of a block of queries and of keys in csrc/cpu/attention.h
_MIN_CHUNK_KEYS, _MAX_CHUNKS = 512, 4

# Forward #


def forward_needs(block: BlockActivations) -> dict[str, int]:
    """{"activations": with its input, "workspace"}."""
    return max(_forward_moments(block, block.saved()), key=lambda moment: sum(moment.values()))


def _forward_moments(
    block: BlockActivations, saved: dict[str, int], result_is_read: bool = True
) -> Iterator[dict[str, int]]:
    """saved: for backward. result_is_read: see `model.block.Block`; if not, the product with down may be left out."""
    of_mlp = {"x_mid", "normed_2", "gate_up", "product"}
    of_mlp |= {name(call) for name in (_narrow, _method) for call in (block.gate_up, block.down)}
    saved_of_attention = {name: size for name, size in saved.items() if name not in of_mlp}

    def moment(saved: dict[str, int], variables: dict[str, int], others: int, workspace: int = 0) -> dict[str, int]:
        there = {name: max(saved.get(name, 0), variables.get(name, 0)) for name in saved | variables}
        return {"activations": sum(there.values()) + others, "workspace": workspace}

    def results(call: Call) -> int:
        """Of its projections, but for what is kept for their methods, or in any case."""
        is_kept = block.is_kept_for_method if _method(call) in saved else lambda p: False
        chosen = [p for p in call.projections if not p.name.endswith("v_proj") and not is_kept(p)]
        return sum(block.features_bytes(p.out_features) for p in chosen)

    def products(call: Call, saved: dict[str, int], variables: dict[str, int]) -> Iterator[dict[str, int]]:
        """Of o or down."""
        before = {name: size for name, size in saved.items() if name != _method(call)}
        tokens = block.run.block_tokens
        widened = max(block.run.widened_bytes(tokens, p.in_features, p.out_features) for p in call.projections)
        if call.is_opaque:
            workspace = max(_dequantized_bytes(block, call) + widened, _fp32_slices_bytes(block, call))
            made = sum(int(block.features_bytes(1) * p.method.forward_features) for p in call.projections)
            yield moment(before, variables, made, workspace)
        else:
            yield moment(before, variables, block.hidden, _dequantized_bytes(block, call) + widened)
            yield moment(saved, variables, results(call), _fp32_slices_bytes(block, call))

    x = {"x": block.hidden}
    projected = {"normed": block.hidden, "before_norm": results(block.qkv)}
    if block.run.num_prefix:  # which makes copies of keys and values, behind itself
        turned = {"turned": block.queries, "values": 2 * (block.keys + block.prefix_keys)}
        projected["values as projected"] = block.keys
    else:
        turned = {"turned": block.queries + block.keys, "values": block.keys}
    attention = x | projected | turned | {"out": block.queries, _narrow(block.o): block.features_bytes(block.o.rank)}
    yield from products(block.o, saved_of_attention, attention)

    before_mlp = x | {"x_mid": block.hidden, "normed_2": block.hidden}
    if block.unit.recompute == "selective" and block.model.qk_norm:  # until it is known who reads what they make
        before_mlp["before_norm"] = projected["before_norm"]
    mlp = before_mlp | {"gate_up": 2 * block.inner, "product": block.inner}
    mlp[_narrow(block.down)] = block.features_bytes(block.down.rank)
    if block.down.drops:  # the product with its zeros, on its way into A
        yield moment(saved, mlp, block.inner)
    if result_is_read or any(p.method.is_opaque or p.method.has_after for p in block.down.projections):
        yield from products(block.down, saved, mlp)
        yield moment(saved, before_mlp, results(block.down) + block.hidden)  # which is added to x_mid
    else:
        yield moment(saved, mlp, 0)
        yield moment(saved, before_mlp, block.hidden)


def _narrow(call: Call) -> str:
    """Name of what the A of its updates make."""
    return f"hidden of {call.projections[0].name}"


def _method(call: Call) -> str:
    """Name of what its methods keep."""
    return f"method of {call.projections[0].name}"


def _dequantized_bytes(block: BlockActivations, call: Call) -> int:
    """Of weights in NF4, as many rows as are dequantised at a time (minift/ops/nf4_linear.py)."""
    most, on_gpu = 0, block.run.is_on_gpu
    for p in call.projections:
        if p.block_size:
            row_bytes = p.in_features * block.run.wire_itemsize
            rows = slice_width(p.out_features, _rows_of_whole_blocks(p), row_bytes, on_gpu)
            most = max(most, row_bytes * rows)
    return most


def _fp32_slices_bytes(block: BlockActivations, call: Call) -> int:
    """Of weights and updates, for methods that read both in fp32 (minift/peft/dora.py): a slice of rows, the one before
    it, and the factors."""
    most, is_wide = 0, block.run.wire_itemsize == 4
    device = torch.device("cuda" if block.run.is_on_gpu else "cpu")
    for p in call.projections:
        if not p.method.slices_weight:
            continue
        rows = 0
        if p.block_size or not is_wide:
            unit = _rows_of_whole_blocks(p) if p.block_size else 1
            rows = -(-rows_in_cache((p.out_features, p.in_features), torch.float32, device) // unit) * unit
            rows = min(p.out_features, rows) + max(0, min(rows, p.out_features - rows))
        factors = 0 if is_wide else sum(update.rank for update in p.updates) * (p.in_features + p.out_features)
        most = max(most, 4 * (p.in_features * rows + factors))
    return most


def _rows_of_whole_blocks(projection: ProjectionShape) -> int:
    return projection.block_size // math.gcd(projection.block_size, projection.in_features)


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
    """(freed so far of what is kept, made again, gradients and temporaries, workspace), beside one gradient of the
    residual path, b·T·D: dout, and behind the MLP's norm that of x_mid. Who runs the block again holds on to dout."""
    is_selective = block.unit.recompute == "selective"

    def kept(*names: str) -> int:
        return sum(block.kept.get(name, 0) for name in names)

    def remade(*names: str) -> int:
        return kept(*names) if is_selective else 0

    def freed(*names: str) -> int:
        return 0 if is_selective else kept(*names)

    def of_after(call: Call) -> int:
        """What is kept for the methods of its projections: freed when they are through, before its products."""
        return 0 if call.is_opaque else kept(_method(call))

    # dout stays beside the gradient that a method of down, or o, makes of it; what it makes of others replaces them.
    dsum = _dsum_bytes(block, block.down, block.needs_dproduct)
    yield 0, 0, dsum, 0
    gone = of_after(block.down)
    if not block.needs_dproduct:
        yield gone, remade("product"), dsum + _parameters_need(block, block.down), 0
        return
    # In one operation with down, the gradient of gate has the place of that of the product, which goes before or, where
    # it is made again, comes after.
    if not is_selective or block.down.is_opaque:
        yield gone, remade("product"), dsum + _parameters_need(block, block.down), 0
        gone += 0 if block.down.is_opaque else freed("product")
    made, workspace = _dx_needs(block, block.down)
    yield gone, remade("product") if block.down.is_opaque else 0, dsum + made, workspace
    if block.down.is_opaque:
        gone += freed("product") + kept(_narrow(block.down), _method(block.down))
        yield gone, 0, 3 * block.inner, 0
    else:
        again = remade("product")
        beside = _parameters_need(block, block.down) if again else _narrow_gradients_bytes(block, block.down)
        yield gone, again, dsum + 2 * block.inner + beside, 0
        gone += kept(_narrow(block.down))

    needs_dx = "x_mid" in block.kept
    kept_results = _kept_results_bytes(block, block.gate_up) if "gate_up" in block.kept else 0
    gone += kept("gate_up") - kept_results
    yield gone, 0, 2 * block.inner + _dsum_bytes(block, block.gate_up, needs_dx), 0
    gone += kept_results + of_after(block.gate_up)
    made, workspace = _product_needs(block, block.gate_up, needs_dx)
    yield gone, remade("normed_2"), 2 * block.inner + made, workspace
    if not block.needs_dx_mid:
        return
    gone += freed("normed_2") + kept("x_mid", _narrow(block.gate_up))
    if block.gate_up.is_opaque:
        gone += kept(_method(block.gate_up))

    needs_dx = "lse" in block.kept
    dout = block.hidden if block.runs_again else 0
    dsum = dout + _dsum_bytes(block, block.o, needs_dx)
    yield gone, 0, dsum, 0
    gone += of_after(block.o)
    made, workspace = _product_needs(block, block.o, needs_dx)
    yield gone, 0, dsum + made, workspace
    if not needs_dx:
        return
    gone += kept(_narrow(block.o))
    if block.o.is_opaque:
        gone += kept(_method(block.o))
    turned = remade("turned") if block.model.qk_norm else 0
    yield gone, turned, dout + 2 * block.queries + 2 * block.keys, _attention_workspace_bytes(block)

    needs_dx = "x" in block.kept
    gone += kept("lse", "out") + (0 if is_selective and block.model.qk_norm else kept("turned"))
    yield gone, 0, dout + block.queries + 2 * block.keys + _dsum_bytes(block, block.qkv, needs_dx), 0
    gone += kept("values") + of_after(block.qkv)
    made, workspace = _product_needs(block, block.qkv, needs_dx)
    yield gone, remade("normed"), dout + block.queries + 2 * block.keys + made, workspace


def _kept_results_bytes(block: BlockActivations, call: Call) -> int:
    """Of results that methods keep for themselves, whoever reads them besides."""
    return sum(block.features_bytes(p.out_features) for p in call.projections if p.method.keeps_output)


def _dsum_bytes(block: BlockActivations, call: Call, needs_dx: bool) -> int:
    """Of the gradient that a method makes of that of a projection's result, for the sum of W x and the updates. One
    that adds something hands the gradient on."""
    if not needs_dx and not any(p.trains_weight or p.updates for p in call.projections):
        return 0
    makes = (p for p in call.projections if p.method.has_after and (p.method.keeps_output or p.method.other_features))
    return max((block.features_bytes(p.out_features) for p in makes if not p.method.is_opaque), default=0)


def _product_needs(block: BlockActivations, call: Call, needs_dx: bool) -> tuple[int, int]:
    """(gradients and temporaries, workspace) of one call's backward at its fullest, beside its douts."""
    of_parameters = (_parameters_need(block, call), 0)
    return max(of_parameters, _dx_needs(block, call), key=sum) if needs_dx else of_parameters


def _parameters_need(block: BlockActivations, call: Call) -> int:
    """Of its parameters' gradients. dropout: x with its zeros."""
    seen = block.features_bytes(call.in_features) if call.drops else 0
    of_weights = max((_gradient_of_weight_bytes(block, p) for p in call.projections if p.trains_weight), default=0)
    return max(of_weights, seen) + _narrow_gradients_bytes(block, call)


def _dx_needs(block: BlockActivations, call: Call) -> tuple[int, int]:
    """(that and temporaries, workspace). dropout: the product with A, and that with its zeros, beside the sum of
    earlier ones."""
    run, tokens = block.run, block.run.block_tokens
    x, narrow = block.features_bytes(call.in_features), _narrow_gradients_bytes(block, call)
    scratch = max((_slice_of_columns_bytes(block, p) for p in call.projections if p.block_size), default=0)
    scratch += max(run.widened_bytes(tokens, p.out_features, p.in_features) for p in call.projections)
    num_updates = sum(len(p.updates) for p in call.projections)
    of_dropped = x * (3 if num_updates > 1 else 2) if call.drops else 0
    return (x + narrow, scratch) if x + scratch > of_dropped else (of_dropped + narrow, 0)


def _narrow_gradients_bytes(block: BlockActivations, call: Call) -> int:
    """Of what A makes; a method that knows only its forward has those of its results besides."""
    opaque = sum(block.features_bytes(p.out_features) for p in call.projections if p.method.is_opaque)
    return block.features_bytes(call.rank) + opaque


def _slice_of_columns_bytes(block: BlockActivations, projection: ProjectionShape) -> int:
    """Of a weight in NF4, as many columns as are dequantised at a time (minift/ops/nf4_linear.py)."""
    column_bytes = projection.out_features * block.run.wire_itemsize
    if projection.in_features % projection.block_size:
        return projection.in_features * column_bytes
    columns = slice_width(projection.in_features, projection.block_size, column_bytes, block.run.is_on_gpu)
    return columns * column_bytes


def _gradient_of_weight_bytes(block: BlockActivations, projection: ProjectionShape) -> int:
    """Scratch of the product that makes it. If its slot cannot add it up itself it passes through a temporary, and
    where it is added to what came before, on a CPU, pieces of it through another in fp32 (minift/grad_slot.py)."""
    run, bucket = block.run, next(b for b in block.unit.buckets if b.trainable)
    widened = run.widened_bytes(projection.out_features, run.block_tokens, projection.in_features)
    if run.adds_products_up_in(bucket.slot_itemsize):
        return widened
    adds = bucket.keeps_full_grads and run.workload.microbatches > 1 and not run.is_on_gpu
    piece = min(4 * projection.weight_numel, ADD_BYTES) if adds else 0
    return run.wire_itemsize * projection.weight_numel + max(widened, piece)


def _attention_workspace_bytes(block: BlockActivations) -> int:
    """Backward of attention. GPU: dq is added up in fp32 (Dao 2023, arXiv 2307.08691). CPU (csrc/cpu/attention.cpp):
    documents of 1024 keys and more are cut into up to 4 chunks, each with its part of dq in fp32, of which the later
    ones are seen by ever fewer queries; and scratch of one thread, with dk and dv of a chunk in fp32."""
    model, work = block.model, block.run.workload
    width, keys = model.num_heads * model.head_dim, work.document_tokens
    if block.run.is_on_gpu:
        return 4 * work.tokens * width
    count = max(1, min(_MAX_CHUNKS, keys // _MIN_CHUNK_KEYS))
    # Chunk c begins where (1 - begin / keys)² = 1 - c / count, and is seen by the queries after its beginning.
    shares = (1 - math.sqrt(1 - c / count) for c in range(count))
    begins = [int(share * keys / _KEYS) * _KEYS for share in shares] + [keys]
    seen = sum(keys - begin for begin in begins[:-1]) if count > 1 else 0
    most_keys = max(stop - begin for begin, stop in zip(begins, begins[1:], strict=False))

    terms = 1 if block.run.wire_itemsize == 4 else 2  # in bf16 rows lie there a second time, in pairs
    dim, lanes = -(-model.head_dim // (16 * terms)) * 16 * terms, _LANES
    rows = (4 + 2 * (terms - 1)) * lanes * dim + (2 + (terms - 1)) * (_KEYS * dim + _KEYS * lanes)
    scratch = rows // terms + 2 * lanes * dim + 2 * most_keys * dim
    return 4 * (work.tokens // keys * seen * width + scratch)
