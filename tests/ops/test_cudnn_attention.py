"""cudnn_attention against minift's own attention in fp64: what it tells cuDNN everywhere, cuDNN itself on a GPU.

Elements are allowed 1e-6 more, for gradients that cancel to 0.

Everywhere: pretended_cudnn.py executes the graphs in fp64, so results differ by their rounding, and gradients by that
of lse to fp32: it moves p by |lse| 2^-24, below a hundredth of a rounding to 16 bits.

On a GPU ("cuda"): p and ds are rounded to 16 bits before they are multiplied, and out, of which backward takes a row
sum, is rounded; each is off by at most half an eps in the mean square, and so are results. The norm of the error is
allowed to be 4 such halves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minift.ops import cudnn_attention as module
from minift.ops.blocked_attention import blocked_attention, blocked_attention_backward
from minift.ops.cudnn_attention import Documents, cudnn_attention, is_usable
from tests.ops.pretended_cudnn import pretended_cudnn

HAS_CUDA_KERNELS = True
property_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTH = st.sampled_from([1, 1, 2, 3, 5, 16, 31, 64, 127, 128, 129, 200])
LENGTHS = st.lists(LENGTH, min_size=1, max_size=9)
ALIKE = st.builds(lambda length, count: [length] * count, LENGTH, st.integers(1, 5))


@pytest.fixture(params=["pretended", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request) -> Iterator[torch.device]:
    """Where tensors are; without a GPU, cuDNN is pretended to be there."""
    if request.param == "cuda":
        if not is_usable(torch.device("cuda", 0)):
            pytest.skip("cuDNN's frontend is not installed, or this GPU is older than Hopper")
        yield torch.device("cuda", 0)
        return
    with pretended_cudnn():
        yield torch.device("cpu")


def check_close(expected: Tensor, actual: Tensor) -> None:
    """Element by element on the CPU, by norm on a GPU; see above."""
    eps = torch.finfo(actual.dtype).eps
    difference = expected - actual.double()
    if actual.is_cuda:
        assert difference.norm() <= 4 * eps / 2 * expected.norm() + 1e-6 * difference.numel() ** 0.5
    else:
        assert (difference.abs() <= 1.05 * eps / 2 * expected.abs() + 1e-6).all()


@property_test
@given(
    lengths=LENGTHS | ALIKE | st.just([512, 512]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    is_slice=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_attention_s(device, lengths, kv_heads, group, dim, dtype, is_slice, seed):
    generator = torch.Generator().manual_seed(seed)
    total, heads = sum(lengths), kv_heads * group
    fused = torch.randn(total, heads + 2 * kv_heads, dim, generator=generator).to(device, dtype)
    q, k, v = (x if is_slice else x.contiguous() for x in fused.split([heads, kv_heads, kv_heads], dim=1))
    dout = torch.randn(total, heads, dim, generator=generator).to(device, dtype)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    out = cudnn_attention(q, k, v, Documents.of(bounds, max(lengths), sum(lengths)))
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    assert out.dtype == dtype and out.shape == q.shape
    exact = [x.detach().double() for x in (q, k, v)]
    expected, lse = blocked_attention(*exact, bounds, bounds, None)
    check_close(expected, out.detach())
    expected_gradients = blocked_attention_backward(
        dout.double(), *exact, out.detach().double(), lse, bounds, bounds, None
    )
    for expected, gradient in zip(expected_gradients, gradients, strict=True):
        assert gradient.dtype == dtype
        check_close(expected, gradient)


@property_test
@given(lengths=LENGTHS, width=st.sampled_from([1, 24, 4096]))
def test_documents_are_padded_with_empty_ones(lengths, width):
    documents = Documents.of(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), sum(lengths))
    padded = documents.lengths_B.tolist()
    assert padded[: len(lengths)] == lengths and not any(padded[len(lengths) :])
    assert len(padded).bit_count() == documents.longest.bit_count() == 1 and documents.count == len(padded)
    assert len(lengths) <= len(padded) < 2 * len(lengths) and documents.longest >= max(lengths)
    starts = [sum(padded[:document]) * width for document in range(len(padded) + 1)]
    assert documents.offsets(width).tolist() == starts and documents.offsets(width).dtype == torch.int64
    assert documents.offsets(width) is documents.offsets(width)


def test_packs_of_about_one_shape_share_a_plan(device):
    """So that a training run builds a few: 3 or 4 documents, the longest of 129 to 256 tokens."""
    misses = []
    for lengths in ([200, 129, 64], [130, 256, 7, 20], [140, 140, 140]):
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        q, k, v = (torch.randn(sum(lengths), 2, 16, device=device, dtype=torch.bfloat16) for _ in range(3))
        cudnn_attention(q, k, v, Documents.of(bounds, max(lengths), sum(lengths)))
        misses.append(module._plan.cache_info().misses)
    assert misses[0] == misses[1] == misses[2]


def test_single_documents_share_a_plan(device):
    misses = []
    for length in (700, 701, 1023):
        bounds = torch.tensor([0, length], device=device, dtype=torch.int32)
        q, k, v = (torch.randn(length, 1, 16, device=device, dtype=torch.bfloat16) for _ in range(3))
        cudnn_attention(q, k, v, Documents.of(bounds, length, length))
        misses.append(module._plan.cache_info().misses)
    assert misses[0] == misses[1] == misses[2]


@property_test
@given(length=st.integers(1, 2048) | st.sampled_from([512, 1024, 1536]), count=st.integers(1, 9))
def test_documents_of_one_length_are_a_batch(length, count):
    documents = Documents.of(torch.arange(0, count * length + 1, length).int(), length, count * length)
    assert (documents == Documents(count, length, None, None)) == (length % module.BATCH_UNIT == 0)


def test_is_not_used_without_a_gpu_or_the_frontend(monkeypatch):
    assert not is_usable(torch.device("cpu"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    is_usable.cache_clear()
    assert not is_usable(torch.device("cuda", 0))
    is_usable.cache_clear()
