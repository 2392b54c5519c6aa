"""Causal attention over packed documents by cuDNN, on Hopper and later GPUs, where its frontend is installed.

    pip install nvidia-cudnn-frontend

PyTorch's own flash attention is written for Ampere; cuDNN's kernels use Hopper's asynchronous copies and products, and
add the gradients of the queries that share a key head inside. PyTorch reaches cuDNN only for batches of one length:
its path for packed documents plans anew at every call, 45 ms each, and its gradients are wrong (torch 2.11).

A *plan* is built for a number of documents and a longest one, in tens of milliseconds. Packs differ in both, so both
are rounded up to powers of two: what is missing are documents of length 0, and how long each document is stays on the
GPU, where nobody waits for it. Offsets of documents are in elements, so there is one tensor of them for each width of a
row. Documents of one length that need no rounding are a batch, for which kernels take a tenth less.

Not here: sliding windows, and keys that documents share; `model/attention.py` leaves these to PyTorch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_LONGEST = 512  # with documents of 100 tokens PyTorch's kernel takes half the time, with 512 cuDNN's
HEAD_DIM_UNIT, MOST_HEAD_DIM = 16, 128  # of backward on Hopper, with a workspace for as many tokens as there are
MOST_PLANS = 64
BATCH_UNIT = 512
"""Of the lengths of documents that may be a batch, each of which has plans of its own."""

_DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
TOTAL_UNIT = 4096
"""Tokens of a pack, which say how large a plan's workspace is, are rounded up to a multiple of this."""


@cache
def is_usable(device: torch.device) -> bool:
    """Whether cuDNN's frontend is installed, and the device is one for which it knows packed documents, forward and
    backward: capability 9 (measured) or 10, not the smaller Blackwells (12)."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("cudnn") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def is_best_for(q_THE: Tensor, longest: int) -> bool:
    """Whether such queries, in documents of up to `longest` tokens, are for `cudnn_attention`."""
    head_dim = q_THE.shape[2]
    is_known = q_THE.dtype in _DTYPES and head_dim % HEAD_DIM_UNIT == 0 and head_dim <= MOST_HEAD_DIM
    return is_known and longest >= LEAST_LONGEST and is_usable(q_THE.device)


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack are, as cuDNN wants to know it. Made once for a pack, used by every layer."""

    count: int
    longest: int
    lengths_B: Tensor | None  # int32, 0 for those that are none; None: all have the same
    starts_B1: Tensor | None  # int64, one more; the end of the pack for those that are none
    _offsets: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int, total: int) -> Documents:
        """total: tokens of the pack, which are document s from cu_seqlens[s] to cu_seqlens[s + 1]."""
        count = len(cu_seqlens) - 1
        if longest % BATCH_UNIT == 0 and count * longest == total:
            return cls(count, longest, None, None)
        missing = round_up_to_power(count) - count
        starts_B1 = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(missing)]).long()
        return cls(count + missing, round_up_to_power(max(longest, 128)), starts_B1.diff().int(), starts_B1)

    def offsets(self, width: int) -> Tensor:
        """In elements, of rows of `width`."""
        if width not in self._offsets:
            self._offsets[width] = self.starts_B1 * width
        return self._offsets[width]


def round_up_to_power(number: int) -> int:
    """The smallest power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def cudnn_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents) -> Tensor:
    """softmax(q kᵀ / √E) v inside each document, causal: (T, H, E) in q's dtype. Differentiable once.

    q (T, H, E), k and v (T, K, E) in bf16 or fp16, E a multiple of 16 up to 128: H/K query heads share a key head. The
    gradient of q is summed in an order that changes from run to run, unless torch wants deterministic algorithms.
    """
    return _CudnnAttention.apply(q_THE.contiguous(), k_TKE.contiguous(), v_TKE.contiguous(), documents)


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents) -> Tensor:
        out_THE, lse_TH = torch.empty_like(q_THE), q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)
        plan = _plan(_case(q_THE, k_TKE, documents, is_backward=False))
        plan.run(documents, {Of.Q: q_THE, Of.K: k_TKE, Of.V: v_TKE, Of.OUT: out_THE, Of.LSE: lse_TH})
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, out_THE, lse_TH)
        ctx.documents = documents
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THE, k_TKE, v_TKE, out_THE, lse_TH = ctx.saved_tensors
        dq_THE, dk_TKE, dv_TKE = (torch.empty_like(tensor) for tensor in (q_THE, k_TKE, v_TKE))
        plan = _plan(_case(q_THE, k_TKE, ctx.documents, is_backward=True))
        plan.run(ctx.documents, {
            Of.Q: q_THE, Of.K: k_TKE, Of.V: v_TKE, Of.OUT: out_THE, Of.LSE: lse_TH, Of.DOUT: dout_THE.contiguous(),
            Of.DQ: dq_THE, Of.DK: dk_TKE, Of.DV: dv_TKE,
        })  # fmt: skip
        return dq_THE, dk_TKE, dv_TKE, None


# --------------------------------------------------------------------------------------------------------------- plans


class Of(IntEnum):
    """Tensors of a plan, by the number that cuDNN knows them by."""

    Q, K, V, OUT, LSE, DOUT, DQ, DK, DV, LENGTHS, Q_OFFSETS, KV_OFFSETS, LSE_OFFSETS = range(1, 14)


@dataclass(frozen=True)
class Case:
    """What a plan is built for."""

    device: torch.device
    dtype: torch.dtype
    num_documents: int
    longest: int
    is_ragged: bool  # else all documents have the longest's length
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_backward: bool
    total: int = 0  # of tokens at most, which backward of ragged documents wants to know
    is_deterministic: bool = False


def _case(q_THE: Tensor, k_TKE: Tensor, documents: Documents, is_backward: bool) -> Case:
    is_ragged = documents.lengths_B is not None
    case = Case(
        q_THE.device, q_THE.dtype, documents.count, documents.longest, is_ragged,
        q_THE.shape[1], k_TKE.shape[1], q_THE.shape[2], is_backward,
    )  # fmt: skip
    if not is_backward:
        return case
    total = -(-len(q_THE) // TOTAL_UNIT) * TOTAL_UNIT if is_ragged else 0
    return replace(case, total=total, is_deterministic=torch.are_deterministic_algorithms_enabled())


@dataclass(frozen=True)
class Plan:
    graph: Any
    handle: Any
    workspace_bytes: int
    widths: tuple[int, int, int]  # of a token's row in q, k and lse, in elements

    def run(self, documents: Documents, tensors: dict[Of, Tensor]) -> None:
        """On the current stream."""
        import cudnn

        device = tensors[Of.Q].device
        if documents.lengths_B is not None:
            offsets = map(documents.offsets, self.widths)
            tensors |= zip((Of.Q_OFFSETS, Of.KV_OFFSETS, Of.LSE_OFFSETS), offsets, strict=True)
            tensors |= {Of.LENGTHS: documents.lengths_B}
        pointers = {int(of): tensor.data_ptr() for of, tensor in tensors.items()}
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        with torch.cuda.device(device):
            cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(device).cuda_stream)
            self.graph.execute(pointers, workspace.data_ptr(), handle=self.handle)


@cache
def _handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@lru_cache(MOST_PLANS)
def _plan(case: Case) -> Plan:
    import cudnn

    handle = _handle(case.device)
    with torch.cuda.device(case.device):
        graph = describe(case, handle)
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise RuntimeError(
                f"cuDNN {cudnn.backend_version()} has no attention for {case}: {error}. Without the package "
                "nvidia-cudnn-frontend PyTorch's is taken, which has"
            ) from error
    widths = (case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim, case.num_heads)
    return Plan(graph, handle, graph.get_workspace_size(), widths)


def describe(case: Case, handle: Any) -> Any:
    """cuDNN's graph: one operation, whose tensors are (documents, heads, longest, head_dim) with offsets of documents.
    """
    import cudnn

    of_dtype, of_float = getattr(cudnn.data_type, _DTYPES[case.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=of_dtype, intermediate_data_type=of_float, compute_data_type=of_float, handle=handle
    )
    documents, longest = case.num_documents, case.longest
    settings = {"attn_scale": case.head_dim**-0.5, "diagonal_band_right_bound": 0}
    of_total, offsets = {}, {}
    if case.is_ragged:
        one_each, bounds = [documents, 1, 1, 1], [documents + 1, 1, 1, 1]
        lengths = graph.tensor(one_each, [1, 1, 1, 1], cudnn.data_type.INT32, uid=Of.LENGTHS)
        offsets = {of: graph.tensor(bounds, [1, 1, 1, 1], cudnn.data_type.INT64, uid=of)
                   for of in (Of.Q_OFFSETS, Of.KV_OFFSETS, Of.LSE_OFFSETS)}  # fmt: skip
        settings |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}
        of_total = {"max_total_seq_len_q": case.total, "max_total_seq_len_kv": case.total}

    def layout(of: Of) -> tuple[list[int], list[int], Any, Any]:
        """Dimensions, strides, offsets and dtype. Strides are those of rows that stand behind each other."""
        heads, width, starts, dtype = case.num_heads, case.head_dim, Of.Q_OFFSETS, of_dtype
        if of in (Of.K, Of.V, Of.DK, Of.DV):
            heads, starts = case.num_kv_heads, Of.KV_OFFSETS
        elif of is Of.LSE:
            width, starts, dtype = 1, Of.LSE_OFFSETS, of_float
        strides = [longest * heads * width, width, heads * width, 1]
        return [documents, heads, longest, width], strides, offsets.get(starts), dtype

    def input_of(of: Of) -> Any:
        dims, strides, starts, dtype = layout(of)
        return graph.tensor(dims, strides, dtype, ragged_offset=starts, uid=of)

    def make_output(tensor: Any, of: Of) -> None:
        dims, strides, starts, dtype = layout(of)
        tensor.set_output(True).set_uid(of).set_dim(dims).set_stride(strides).set_data_type(dtype)
        if starts is not None:
            tensor.set_ragged_offset(starts)

    if case.is_backward:
        inputs = map(input_of, (Of.Q, Of.K, Of.V, Of.OUT, Of.DOUT, Of.LSE))
        results = graph.sdpa_backward(
            *inputs, use_deterministic_algorithm=case.is_deterministic, **of_total, **settings
        )
        made = (Of.DQ, Of.DK, Of.DV)
    else:
        results = graph.sdpa(*map(input_of, (Of.Q, Of.K, Of.V)), generate_stats=True, **settings)
        made = (Of.OUT, Of.LSE)
    for tensor, of in zip(results, made, strict=True):
        make_output(tensor, of)
    return graph
