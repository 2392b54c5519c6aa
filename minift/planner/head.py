"""Bytes of the head and its loss, which makes its gradients in forward (minift/objectives/cross_entropy.py).

Of M rows with a target and D features: the rows, their gradient, a chunk of C rows of V logits, and the gradient of a
trained head, V·D, unless that is made where it is reduced (minift/grad_slot.py).
"""

from __future__ import annotations

from minift.objectives.cross_entropy import default_chunk_tokens, even_chunk
from minift.ops.cross_entropy import WIDE_BYTES
from minift.planner.shapes import RunShape


def head_bytes(run: RunShape, trains: bool) -> dict[str, int]:
    """At the last chunk. trains: whether the rows need a gradient."""
    rows, vocab, b = run.workload.num_targets, run.model.vocab_size, run.wire_itemsize
    chunk = _head_chunk(run)
    logits = chunk * vocab * b
    in_rows = (2 if trains else 1) * rows * run.model.hidden_size * b
    return {"LM head": in_rows + logits + _head_grad_bytes(run) + _head_term_bytes(run) + _head_widened_bytes(run)}


def head_backward_bytes(run: RunShape, trains: bool) -> dict[str, int]:
    """The gradient of all rows of which those with a target are filled, from a scaled copy of these; then the scaled
    gradient of a trained head, unless it is in its slot. What is not fp32 is scaled there, some rows at a time."""
    b, rows = run.wire_itemsize, run.workload.num_targets
    of_token = run.model.hidden_size * b if trains else 0
    grad = _head_grad_bytes(run)
    scaled_hidden = (run.block_tokens + 2 * rows) * of_token + grad + _scaling_bytes(run, rows if trains else 0, 2)
    scaled_head = (run.block_tokens + rows) * of_token + grad + (run.head.weight_numel * b if grad else 0)
    if run.head.trains_weight and rows and not is_claimed_in_fp32(run):
        scaled_head += _scaling_bytes(run, run.head.out_features, 1 if _head_sum_itemsize(run) == 4 else 2)
    return {"LM head": max(scaled_hidden, scaled_head)}


def tied_head_grad_bytes(run: RunShape) -> int:
    """The gradient of a head that is the embedding, too, waits for the embedding's, unless it is in its slot."""
    numel = run.head.weight_numel
    return numel * run.wire_itemsize if run.model.tie_word_embeddings and _head_grad_bytes(run) else 0


def is_claimed_in_fp32(run: RunShape) -> bool:
    """Whether the gradient of a trained head is made, and scaled, in the fp32 memory where it is reduced."""
    return not _head_grad_bytes(run) and any(b.slot_itemsize == 4 for b in run.root.buckets if b.trainable)


def _head_chunk(run: RunShape) -> int:
    """Rows of logits at a time (`objectives.cross_entropy`)."""
    rows = run.workload.num_targets
    trains_head = run.head.trains_weight or run.head.trains_bias or bool(run.head.adapter)
    is_dense = not run.head.adapter
    chunk = default_chunk_tokens(run.model.vocab_size, run.wire_itemsize, run.is_on_gpu, trains_head, is_dense)
    return min(rows, even_chunk(rows, chunk))


def _head_grad_bytes(run: RunShape) -> int:
    """The gradient of a trained head between its forward and its backward; none where it is made in its slot: in fp32,
    or one chunk in the dtype of the slot, and nothing there yet."""
    if not run.head.trains_weight or not run.workload.num_targets:
        return 0
    bucket = next(b for b in run.root.buckets if b.trainable)
    is_empty = not bucket.keeps_full_grads or run.workload.microbatches == 1
    is_claimed = bucket.slot_itemsize in (_head_sum_itemsize(run), 4) and is_empty
    return 0 if is_claimed else run.head.weight_numel * _head_sum_itemsize(run)


def _head_sum_itemsize(run: RunShape) -> int:
    """Of several chunks, and of fp16, it is summed up in fp32."""
    return 4 if _head_has_terms(run) or run.precision.wire == "float16" else run.wire_itemsize


def _head_widened_bytes(run: RunShape) -> int:
    """Of the products that make logits, and the gradients of rows and of a trained head."""
    chunk, hidden, vocab = _head_chunk(run), run.model.hidden_size, run.model.vocab_size
    shapes = [(chunk, hidden, vocab), (chunk, vocab, hidden)]
    shapes += [(vocab, chunk, hidden)] if run.head.trains_weight else []
    return max(run.widened_bytes(*shape) for shape in shapes)


def _head_has_terms(run: RunShape) -> bool:
    return _head_chunk(run) < run.workload.num_targets


def _head_term_bytes(run: RunShape) -> int:
    """Of the gradient of a trained head what one chunk adds to an fp32 sum, unless the product does so itself, which
    that of fp16 does with fp32 factors."""
    if not run.head.trains_weight or not run.workload.num_targets or run.adds_products_up_in(4):
        return 0
    if run.precision.wire == "float16":
        return 4 * _head_chunk(run) * (run.model.vocab_size + run.model.hidden_size)
    return run.head.weight_numel * run.wire_itemsize if _head_has_terms(run) or is_claimed_in_fp32(run) else 0


def _scaling_bytes(run: RunShape, num_rows: int, num_temporaries: int) -> int:
    """In fp32, of a gradient that is not."""
    row_bytes = 4 * run.model.hidden_size
    if run.wire_itemsize == 4:
        return 0
    return num_temporaries * row_bytes * min(num_rows, max(1, _wide_bytes(run) // row_bytes))


def _wide_bytes(run: RunShape) -> int:
    """Of what is computed in fp32 at a time."""
    return WIDE_BYTES["cuda" if run.is_on_gpu else "cpu"]
