"""Fixtures for the op tests: every compiled instruction set in turn, threads, and tensors in awkward layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from minift.ops import extension
from tests.cuda_on_cpu import library as cuda_on_cpu
from tests.cuda_on_cpu.library import guarded
from tests.ops.elsewhere import kernels_replaced, on_copies

T = TypeVar("T")


def _offered_instruction_sets() -> list[str]:
    """Those that this processor can run, the portable one first; none without the extension."""
    if extension.MISSING_REASON is not None:
        return []
    names = ["portable", "avx2", "avx512", "avx512_bf16"]
    return names[: names.index(extension.instruction_set()) + 1]


@pytest.fixture(params=_offered_instruction_sets())
def instruction_set(request):
    """The compiled kernels, once per instruction set."""
    torch.ops.minift.use_instruction_set(request.param)
    yield request.param
    torch.ops.minift.use_instruction_set("best")


def pytest_generate_tests(metafunc):
    """`compiled` is each way of running the compiled ops of a test file: every instruction set, unless the file says
    that HAS_CPU_KERNELS is false, and, if it says HAS_CUDA_KERNELS, the CUDA kernels on the processor, and on the GPU
    if there is one; `implementation` is the references, too."""
    compiled = _offered_instruction_sets() if getattr(metafunc.module, "HAS_CPU_KERNELS", True) else []
    if getattr(metafunc.module, "HAS_CUDA_KERNELS", False) and extension.MISSING_REASON is None:
        compiled += ["cuda_on_cpu"] if cuda_on_cpu.compiler() is not None else []
        compiled += ["cuda"] if torch.cuda.is_available() else []
    for fixture, names in (("implementation", ["reference", *compiled]), ("compiled", compiled)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


@pytest.fixture(scope="session")
def cuda_on_cpu_ops():
    """Names of the ops with a CUDA kernel; if they do not compile, every test says so but none tries again."""
    return cuda_on_cpu.op_names()


@pytest.fixture
def implementation(request):
    """ "reference", or the name of the kernels that run during the test: an instruction set, cuda_on_cpu or cuda."""
    yield from _running(request)


@pytest.fixture
def compiled(request):
    """As `implementation`, without the reference."""
    yield from _running(request)


def _running(request) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
    elif request.param == "cuda_on_cpu":
        names = request.getfixturevalue("cuda_on_cpu_ops")
        with kernels_replaced(names, lambda name: on_copies(cuda_on_cpu.op(name), guarded, guarded)):
            yield "cuda_on_cpu"
    elif request.param == "cuda":
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        names = [name.removeprefix("minift::") for name in names if name.startswith("minift::")]
        ops = {name: getattr(torch.ops.minift, name).default for name in names}
        with kernels_replaced(names, lambda name: on_copies(ops[name], Tensor.cuda, Tensor.clone)):
            yield "cuda"
    else:
        torch.ops.minift.use_instruction_set(request.param)
        yield request.param
        torch.ops.minift.use_instruction_set("best")


@pytest.fixture
def in_threads() -> Iterator[Callable[[Callable[[], T]], list[T]]]:
    """in_threads(function): its results with one, two and three threads."""
    num_threads = torch.get_num_threads()

    def run(function: Callable[[], T]) -> list[T]:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def rounding():
    """rounding(exact, dtype): how far the rounding of exact fp64 values to the dtype may move them."""

    def limit(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Near zero: half of fp16's smallest subnormal; subnormals of bf16 are taken for zero by AVX-512.
        smallest = 2.0**-25 if dtype == torch.float16 else torch.finfo(torch.float32).tiny
        return torch.finfo(dtype).eps / 2 * exact.abs() + smallest

    return limit


@pytest.fixture(scope="session")
def draw_tensor():
    """draw_tensor(generator, shape, dtype, layout): normal values in memory laid out as `layout` says."""

    def draw(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous"):
        if layout == "contiguous":
            wide = torch.randn(shape, generator=generator)
        elif layout == "slice of wider rows":
            wide = torch.randn((*shape[:-1], 2 * shape[-1] + 3), generator=generator)[..., 2 : 2 + shape[-1]]
        elif layout == "every second row":
            wide = torch.randn((*shape[:-2], 2 * shape[-2], shape[-1]), generator=generator)[..., ::2, :]
        elif layout == "slice of a fused projection":  # two strides that cannot be merged into one
            start, width = shape[-2], 2 * shape[-1] + 3
            wide = torch.randn((*shape[:-2], 3 * shape[-2], width), generator=generator)
            wide = wide[..., start : 2 * start, 2 : 2 + shape[-1]]
        elif layout == "transposed":
            return torch.randn((shape[-1], *shape[:-1]), generator=generator).to(dtype).movedim(0, -1)
        elif layout == "expanded":
            return torch.randn(shape[-1], generator=generator).to(dtype).expand(shape)
        # Tensor.to() would give some of these contiguous strides.
        return torch.empty_strided(wide.shape, wide.stride(), dtype=dtype).copy_(wide)

    return draw
