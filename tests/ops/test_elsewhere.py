"""Ops run with other kernels: nothing changes for who calls them, and afterwards everything is as before."""

from __future__ import annotations

import pytest
import torch

from minift.ops import extension, nf4
from tests.cuda_on_cpu import library as cuda_on_cpu
from tests.cuda_on_cpu.library import guarded
from tests.ops.elsewhere import kernels_replaced, on_copies

pytestmark = [
    pytest.mark.skipif(extension.MISSING_REASON is not None, reason="needs the extension"),
    pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs a C++ compiler"),
]


def test_the_kernels_are_replaced_and_come_back():
    calls = []

    def kernel_of(name):
        def kernel(weight, block_size):
            calls.append(name)
            return cuda_on_cpu.op(name)(weight, block_size)

        return kernel

    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = nf4.quantize_nf4(weight)
    with kernels_replaced(["nf4_quantize"], kernel_of):
        replaced = nf4.quantize_nf4(weight)
    after = nf4.quantize_nf4(weight)
    assert calls == ["nf4_quantize"]
    for codes, absmax in (replaced, after):
        assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


def test_what_an_op_changes_in_place_comes_back_from_the_device():
    """Neighbours in memory stay as they are."""
    weight = torch.randn(640, generator=torch.Generator().manual_seed(1))
    codes, absmax = nf4.quantize_nf4(weight)
    memory = torch.full((700,), 7.0)
    dequantize = on_copies(cuda_on_cpu.op("nf4_dequantize"), guarded, guarded)
    dequantize(memory[30:670].view(1, -1), codes, absmax, None, None, None, 64, 0, 0)
    matrix = nf4.Nf4(codes=codes, absmax=absmax, shape=(640,), block_size=64)
    assert torch.equal(memory[30:670], nf4.dequantize_nf4(matrix, torch.float32))
    assert (memory[:30] == 7).all() and (memory[670:] == 7).all()


def test_what_an_op_returns_comes_back_from_the_device():
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(2)).t()
    expected = nf4.quantize_nf4(weight)
    codes, absmax = on_copies(cuda_on_cpu.op("nf4_quantize"), guarded, guarded)(weight, 64)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


def test_what_an_op_reads_on_the_host_stays_there():
    there, here, used = [], [], []

    def copied_to(place):
        def copy(memory):
            place.append(memory.clone())
            return place[-1]

        return copy

    def op(*arguments):
        used.extend(argument.untyped_storage()._cdata for argument in arguments)

    op._schema = torch.ops.minift.sgmv_.default._schema
    arguments = [torch.empty(0, 3) for _ in range(7)]  # no memory: all of them have one address
    on_copies(op, copied_to(there), copied_to(here))(*arguments)
    assert set(used[:4]) <= {memory.untyped_storage()._cdata for memory in there}
    assert set(used[4:]) <= {memory.untyped_storage()._cdata for memory in here}
