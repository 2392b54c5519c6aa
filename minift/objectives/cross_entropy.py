"""Cross entropy of a linear head without ever holding the logits of all tokens.

A full logits tensor is the largest tensor of a step (8192 tokens x 128k words in bf16 and fp32, with gradients: 15 GB).
Here the rows that have a target are taken first (a prompt costs nothing) and go through the head in chunks: logits by
one GEMM in the weight's dtype, fp32 log-sum-exp, softmax - one_hot written over the logits, and from that the gradients
by one GEMM each, all in the *forward*; backward only multiplies them by the incoming scalar. So a frozen head costs two
GEMMs, and backward reads no weight, whose memory FSDP may have given to another unit by then. Liger's fused linear
cross entropy (arXiv 2410.10989) is the same idea; its chunks shrink as the vocabulary grows, until the GEMM is slow.

A head that is not one dense weight (LoRA around it, ...) runs as a module, chunk by chunk, with `torch.autograd.grad`
in the forward too, so dropout is drawn once. Either way each trainable parameter gets one gradient per call, through
the graph, and hooks on parameters fire once, as for any layer.

Memory, beside the gradients returned: one chunk of logits (two for a module head), and for a trainable head of more
than one chunk its gradient in fp32, (V, D), until backward, because bf16 would round after each chunk; so too for one
chunk of fp16, which would overflow. Where the parameter has an empty slot (`grad_slot`) of that dtype, or of fp32, the
gradient is made and scaled in there.

Not here: label smoothing, z-loss, second derivatives. The sum is never divided: see `types.LossSum`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minift.grad_slot import GradSlot, claim_slot, slot_of, without_slots
from minift.ops.cross_entropy import WIDE_BYTES, cross_entropy_
from minift.ops.matmul import addmm_, mm

IGNORE = -100  # target of a row that is not supervised

_LOGITS_BYTES = 256 << 20  # a chunk of logits is this large ...
_MIN_CHUNK_TOKENS = 1024  # ... or larger: with fewer rows the GEMM would wait for the weight to be read
_SMALL_LOGITS_BYTES = 24 << 20  # in the last cache of a CPU, and at malloc's hand: 32 MiB are fresh pages each time
_MIN_SMALL_CHUNK_TOKENS = 256


def linear_cross_entropy(
    hidden_ND: Tensor,
    lm_head: nn.Module,
    targets_N: Tensor,
    chunk_tokens: int | None = None,
    num_targets: int | None = None,
) -> Tensor:
    """Sum over the supervised rows n of -log softmax(lm_head(hidden_ND[n]))[targets_N[n]].

    Args:
        hidden_ND: (N, D), in the dtype of the head's weight.
        lm_head: a dense linear layer (`weight` (V, D), `bias` (V,) or None), frozen or trainable, or any module that
            maps (n, D) to (n, V) row by row.
        targets_N: (N,) int64, in [0, V) or IGNORE.
        chunk_tokens: at most so many rows have their logits in memory; None: `default_chunk_tokens`, which reads
            `lm_head.out_features`.
        num_targets: how many of targets_N are not IGNORE, if the host knows; else, on a GPU, it waits to hear it.

    Returns:
        0-dim fp32 tensor (fp64 for fp64 input). With M = 0 it is 0, and backward still reaches hidden and head.
    """
    if num_targets is None:
        rows_M = (targets_N != IGNORE).nonzero().squeeze(1)
    else:
        rows_M = (targets_N == IGNORE).argsort(stable=True)[:num_targets]
    trainable = [parameter for parameter in lm_head.parameters() if parameter.requires_grad]
    if chunk_tokens is None:
        is_on_gpu = hidden_ND.device.type != "cpu"
        chunk_tokens = default_chunk_tokens(
            lm_head.out_features, hidden_ND.element_size(), is_on_gpu, bool(trainable), _is_dense(lm_head)
        )
    with_graph = torch.is_grad_enabled()  # inside a Function this is always off
    return _LinearCrossEntropy.apply(with_graph, hidden_ND, lm_head, targets_N, rows_M, chunk_tokens, *trainable)


def default_chunk_tokens(
    vocab_size: int, element_bytes: int, is_on_gpu: bool, is_trained: bool, is_dense: bool = True
) -> int:
    """Rows of logits in 256 MiB, but at least 1024. A frozen head on a CPU: in 24 MiB, but at least 256. The gradients
    of a trained dense one's chunks are added up in fp32, which on a GPU is memory's work: there, twice as many rows."""
    if not is_on_gpu and not is_trained:
        return max(_MIN_SMALL_CHUNK_TOKENS, _SMALL_LOGITS_BYTES // (vocab_size * element_bytes))
    chunk_tokens = max(_MIN_CHUNK_TOKENS, _LOGITS_BYTES // (vocab_size * element_bytes))
    return 2 * chunk_tokens if is_on_gpu and is_trained and is_dense else chunk_tokens


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_graph, hidden_ND, lm_head, targets_N, rows_M, chunk_tokens, *trainable) -> Tensor:
        trainable = trainable if with_graph else ()
        needs_hidden = with_graph and ctx.needs_input_grad[1]
        run_head = _dense_head if _is_dense(lm_head) else _module_head
        hidden_MD, targets_M = hidden_ND[rows_M], targets_N[rows_M]
        loss_sum, *gradients = run_head(
            hidden_MD, targets_M, lm_head, even_chunk(len(rows_M), chunk_tokens), needs_hidden, trainable
        )
        ctx.trainable = trainable
        # What was claimed stays in its slot: saved, it would be a view of memory that is not autograd's.
        of_trainable = zip(trainable, gradients[1:], strict=True)
        ctx.claimed = [d if _is_claimed(parameter, d) else None for parameter, d in of_trainable]
        kept = [d if claimed is None else None for claimed, d in zip(ctx.claimed, gradients[1:], strict=True)]
        ctx.save_for_backward(rows_M, gradients[0], *kept)
        ctx.hidden_shape = hidden_ND.shape
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss_sum: Tensor) -> tuple[Tensor | None, ...]:
        rows_M, d_hidden_MD, *d_trainable = ctx.saved_tensors
        d_hidden_ND = None
        if d_hidden_MD is not None:
            d_hidden_ND = d_hidden_MD.new_zeros(ctx.hidden_shape)
            d_hidden_ND[rows_M] = _scaled(d_hidden_MD, d_loss_sum, d_hidden_MD.dtype)
        scaled: list[Tensor | None] = []
        for parameter, claimed, d in zip(ctx.trainable, ctx.claimed, d_trainable, strict=True):
            if claimed is not None:
                if not _is_claimed(parameter, claimed):
                    raise RuntimeError(
                        "the gradient of the LM head, computed in forward, is gone: gradients were cleared between a "
                        "forward and its backward, or this is the second backward over one graph"
                    )
                _scale_into(claimed, claimed, d_loss_sum)
                slot_of(parameter).finish(claimed)
            scaled.append(None if claimed is not None else _scaled(d, d_loss_sum, parameter.dtype))
        return None, d_hidden_ND, None, None, None, None, *scaled


def _dense_head(hidden_MD, targets_M, lm_head, chunk_tokens, needs_hidden, trainable) -> list[Tensor | None]:
    """[loss_sum, its gradient for hidden (or None), and for each of `trainable`], by explicit GEMMs."""
    weight_VD, bias_V = lm_head.weight, lm_head.bias
    d_hidden_MD = torch.empty_like(hidden_MD) if needs_hidden else None
    sum_dtype = _statistics_dtype(hidden_MD)
    loss_sum = hidden_MD.new_zeros((), dtype=sum_dtype)
    # Several chunks are summed in fp32. So is one of fp16: before it is divided by the step's weight, the gradient of a
    # frequent token may pass 65504, and no loss scale would cure it, as that comes later.
    is_rounded_once = len(hidden_MD) <= chunk_tokens and hidden_MD.dtype != torch.float16
    weight_dtype = hidden_MD.dtype if is_rounded_once else sum_dtype
    sums = {
        parameter: _claimed_sum(parameter, sum_dtype if parameter is bias_V else weight_dtype, sum_dtype)
        for parameter in trainable
    }
    # One buffer for all chunks: on a CPU, fresh pages for each would take as long as the softmax.
    buffer_CV = hidden_MD.new_empty(min(chunk_tokens, len(hidden_MD)), len(weight_VD))
    for start in range(0, len(hidden_MD), chunk_tokens):
        here = slice(start, start + chunk_tokens)
        hidden_CD = hidden_MD[here]
        logits_CV = buffer_CV[: len(hidden_CD)]
        if bias_V is None:
            mm(hidden_CD, weight_VD.t(), out=logits_CV)
        else:
            addmm_(logits_CV.copy_(bias_V), hidden_CD, weight_VD.t())
        loss_sum += cross_entropy_(logits_CV, targets_M[here], needs_hidden or bool(trainable)).sum()
        if needs_hidden:
            mm(logits_CV, weight_VD, out=d_hidden_MD[here])
        for parameter in trainable:
            if parameter is bias_V:
                sums[parameter].add(logits_CV.sum(0, dtype=sum_dtype))
            else:
                sums[parameter].add_product(*_summable(logits_CV.t(), hidden_CD))
    return [loss_sum, d_hidden_MD, *(_closed(sums[parameter]) for parameter in trainable)]


def _module_head(hidden_MD, targets_M, lm_head, chunk_tokens, needs_hidden, trainable) -> list[Tensor | None]:
    """What `_dense_head` returns, for a head known by its forward only."""
    d_hidden_MD = torch.empty_like(hidden_MD) if needs_hidden else None
    loss_sum = hidden_MD.new_zeros((), dtype=_statistics_dtype(hidden_MD))
    is_one_chunk = len(hidden_MD) <= chunk_tokens
    sums = {
        parameter: _sum(parameter, parameter.dtype if is_one_chunk else _statistics_dtype(parameter))
        for parameter in trainable
    }
    needs_any = needs_hidden or bool(trainable)
    for start in range(0, len(hidden_MD), chunk_tokens):
        here = slice(start, start + chunk_tokens)
        hidden_CD = hidden_MD[here].requires_grad_(needs_hidden)
        with torch.set_grad_enabled(needs_any):
            logits_CV = lm_head(hidden_CD)
        # Not in place: the head may need its own output in backward.
        d_logits_CV = logits_CV.detach().clone(memory_format=torch.contiguous_format)
        loss_sum += cross_entropy_(d_logits_CV, targets_M[here], needs_any).sum()
        if needs_any:
            inputs = [hidden_CD, *trainable] if needs_hidden else trainable
            with without_slots(trainable):  # these gradients are not scaled yet
                gradients = torch.autograd.grad(logits_CV, inputs, d_logits_CV, materialize_grads=True)
            if needs_hidden:
                d_hidden_MD[here], *gradients = gradients
            for parameter, gradient in zip(trainable, gradients, strict=True):
                sums[parameter].add(gradient)
    return [loss_sum, d_hidden_MD, *(_closed(sums[parameter]) for parameter in trainable)]


def _is_dense(lm_head: nn.Module) -> bool:
    """Is it y = x W^T + b? Told by what it owns: one 2-D floating `weight`, perhaps a `bias`, and no part beside."""
    owned = dict(lm_head.named_parameters())
    return (
        owned.keys() in ({"weight"}, {"weight", "bias"})
        and owned["weight"].dim() == 2
        and owned["weight"].is_floating_point()
        and not list(lm_head.children())
        and not list(lm_head.buffers())
    )


def even_chunk(num_rows: int, chunk_tokens: int) -> int:
    """The chunk that cuts the rows into as few pieces, but of equal size: a last chunk of a few rows would be slow."""
    num_chunks = -(-num_rows // chunk_tokens)
    return -(-num_rows // max(1, num_chunks)) or 1


def _statistics_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum(parameter: Tensor, dtype: torch.dtype) -> GradSlot:
    """Where a gradient of `parameter` is added up."""
    return GradSlot(torch.empty(parameter.shape, dtype=dtype, device=parameter.device))


def _claimed_sum(parameter: Tensor, dtype: torch.dtype, sum_dtype: torch.dtype) -> GradSlot:
    """The same, in `dtype` or a wider one, in the memory where gradients of `parameter` are reduced if it can be had:
    see `GradSlot.claim`."""
    memory = claim_slot(parameter, dtype)
    if memory is None:
        memory = claim_slot(parameter, sum_dtype)
    return _sum(parameter, dtype) if memory is None else GradSlot(memory)


def _summable(*factors: Tensor) -> Iterator[Tensor]:
    """`factors` whose product can be summed in fp32. That of fp16 on a CPU would be fp16 first."""
    is_fp16_on_cpu = factors[0].dtype == torch.float16 and not factors[0].is_cuda
    return (factor.float() if is_fp16_on_cpu else factor for factor in factors)


def _closed(gradient: GradSlot) -> Tensor:
    gradient.close()  # zero, if nothing is supervised
    return gradient.tensor


def _is_claimed(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether `gradient` is memory that this backward's forward has claimed."""
    slot = slot_of(parameter)
    return slot is not None and slot.holds(gradient)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor in `dtype`, see `_scale_into`."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    _scale_into(out, gradient, factor)
    return out


def _scale_into(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """out = gradient · factor; `out` may be `gradient`. The product is formed in fp32, since a bf16 factor, 1 / (tokens
    of the step), would be off by up to 2^-9 for all; and by few rows where that takes memory, since a head is large."""
    if out.dtype == gradient.dtype == factor.dtype:
        torch.mul(gradient, factor, out=out)
        return
    num_rows = max(1, WIDE_BYTES[gradient.device.type] // (4 * max(1, gradient[:1].numel())))
    for out_rows, rows in zip(out.split(num_rows), gradient.split(num_rows), strict=True):
        out_rows.copy_(rows.to(factor.dtype) * factor)
