"""As much of cuDNN's frontend as minift/ops/cudnn_attention.py uses, for memory of the CPU, in fp64.

A graph keeps what it was told; to execute it means to read tensors as its documentation says they lie: (b, h, s, e) of
a tensor is at the sum of index * stride, in elements; of a ragged one with offset[b] for b's part, and s below the
length of b. Whatever lies elsewhere is neither read nor written.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minift.ops import cudnn_attention


@contextmanager
def pretended_cudnn() -> Iterator[pytest.MonkeyPatch]:
    """Inside, cudnn_attention.py finds this module where it looks for cuDNN's frontend, and tensors may be on a CPU."""
    for cached in (cudnn_attention._plan, cudnn_attention._handle):
        cached.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cudnn", sys.modules[__name__])
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield patch
    for cached in (cudnn_attention._plan, cudnn_attention._handle):
        cached.cache_clear()


class data_type(Enum):  # noqa: N801
    HALF, BFLOAT16, FLOAT = torch.float16, torch.bfloat16, torch.float32
    INT32, INT64 = torch.int32, torch.int64


heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")


class cudnnGraphNotSupportedError(Exception):  # noqa: N801, N818
    pass


def create_handle() -> str:
    return "handle"


def set_stream(handle: Any, stream: int) -> None:
    assert handle == "handle"


@dataclass
class Described:
    dim: list[int] | None = None
    stride: list[int] | None = None
    dtype: data_type | None = None
    ragged_offset: Described | None = None
    uid: int | None = None
    is_output: bool = False

    def _set(self, **values: Any) -> Described:
        vars(self).update(values)
        return self

    def set_output(self, value: bool) -> Described:
        return self._set(is_output=value)

    def set_uid(self, value: int) -> Described:
        return self._set(uid=int(value))

    def set_dim(self, value: list[int]) -> Described:
        return self._set(dim=value)

    def set_stride(self, value: list[int]) -> Described:
        return self._set(stride=value)

    def set_ragged_offset(self, value: Described) -> Described:
        return self._set(ragged_offset=value)

    def set_data_type(self, value: data_type) -> Described:
        return self._set(dtype=value)


class pygraph:  # noqa: N801
    def __init__(self, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, handle: Any) -> None:
        assert intermediate_data_type is compute_data_type is data_type.FLOAT and handle == "handle"
        self.is_built = False

    def tensor(self, dim, stride, data_type, ragged_offset=None, uid=None) -> Described:
        return Described(dim, stride, data_type, ragged_offset, int(uid))

    def sdpa(self, q, k, v, generate_stats: bool, **settings: Any) -> tuple[Described, Described]:
        assert generate_stats
        self.inputs, self.outputs, self.settings = (q, k, v), (Described(), Described()), settings
        return self.outputs

    def sdpa_backward(self, q, k, v, o, dO, stats, **settings: Any) -> tuple[Described, ...]:  # noqa: N803
        self.inputs, self.outputs, self.settings = (q, k, v, o, dO, stats), tuple(Described() for _ in "qkv"), settings
        return self.outputs

    def build(self, modes: list[str]) -> None:
        assert all(tensor.is_output and tensor.dtype for tensor in self.outputs)
        self.is_built = True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pointers: dict[int, int], workspace: int, handle: str) -> None:
        assert self.is_built and handle == "handle"
        settings = self.settings
        assert settings["diagonal_band_right_bound"] == 0
        documents, _, longest, _ = self.inputs[0].dim
        lengths = [longest] * documents
        if "seq_len_q" in settings:
            assert settings["use_padding_mask"] and settings["seq_len_kv"] is settings["seq_len_q"]
            lengths = memory_of(settings["seq_len_q"], pointers, documents).tolist()
            if len(self.inputs) > 3:  # memory for as many is taken in backward
                assert sum(lengths) <= settings["max_total_seq_len_q"] == settings["max_total_seq_len_kv"]
        for document, length in enumerate(lengths):
            views = [
                [self._head(tensor, pointers, document, length, head) for head in range(tensor.dim[1])]
                for tensor in (*self.inputs, *self.outputs)
            ]
            inputs, outputs = views[: len(self.inputs)], views[len(self.inputs) :]
            compute = attend if len(self.inputs) == 3 else attend_backward
            compute(*inputs, *outputs, scale=settings["attn_scale"])

    def _head(self, tensor: Described, pointers: dict[int, int], document: int, length: int, head: int):
        """(length, width) of the memory of one document and head."""
        assert length <= tensor.dim[2] and len(tensor.dim) == len(tensor.stride) == 4
        start, width = document * tensor.stride[0], tensor.dim[3]
        if tensor.ragged_offset is not None:
            start = int(memory_of(tensor.ragged_offset, pointers, tensor.dim[0] + 1)[document])
            assert tensor.ragged_offset.dim == [tensor.dim[0] + 1, 1, 1, 1]
        start += head * tensor.stride[1]
        if length == 0:
            return torch.empty(0, width)
        _, _, of_token, of_element = tensor.stride
        count = start + (length - 1) * of_token + (width - 1) * of_element + 1
        return memory_of(tensor, pointers, count).as_strided((length, width), (of_token, of_element), start)


def memory_of(tensor: Described, pointers: dict[int, int], count: int) -> torch.Tensor:
    dtype = tensor.dtype.value
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointers[tensor.uid])
    return torch.frombuffer(memory, dtype=dtype)


def groups(q: list, k: list) -> Iterator[tuple[int, int]]:
    for head in range(len(q)):
        yield head, head // (len(q) // len(k))


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return (q.double() @ k.double().t() * scale).masked_fill(hidden, -torch.inf)


def attend(q: list, k: list, v: list, out: list, lse: list, scale: float) -> None:
    for head, of in groups(q, k):
        s = scores(q[head], k[of], scale)
        out[head].copy_(s.softmax(1) @ v[of].double())
        lse[head].copy_(s.logsumexp(1, keepdim=True))


def attend_backward(q: list, k: list, v: list, out: list, dout: list, lse: list, dq, dk, dv, scale: float) -> None:
    sums = [[torch.zeros_like(x).double() for x in of] for of in (k, v)]
    for head, of in groups(q, k):
        p = (scores(q[head], k[of], scale) - lse[head].double()).exp()
        row_sum = (dout[head].double() * out[head].double()).sum(1, keepdim=True)
        ds = p * (dout[head].double() @ v[of].double().t() - row_sum) * scale
        dq[head].copy_(ds @ k[of].double())
        sums[0][of] += ds.t() @ q[head].double()
        sums[1][of] += p.t() @ dout[head].double()
    for of, (of_k, of_v) in enumerate(zip(*sums, strict=True)):
        dk[of].copy_(of_k)
        dv[of].copy_(of_v)
