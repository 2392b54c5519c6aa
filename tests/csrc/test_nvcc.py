"""The CUDA sources compile, without a warning, for every GPU they are meant for, and no kernel spills registers.

No GPU is needed. What the kernels compute is held by tests/ops, which run them on the processor (tests/cuda_on_cpu).
"""

from __future__ import annotations

import re
import subprocess
import sysconfig

import pytest
from torch.utils.cpp_extension import include_paths

from tests.csrc.nvcc import ARCHITECTURES, CSRC, NVCC, SOURCES, compiled
from tests.cuda_on_cpu.library import STABLE_ABI

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_warnings_and_spills(source):
    done = compiled(source).result()
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        done.stderr,
        flags=re.DOTALL,
    )
    assert {architecture for _, architecture, *_ in kernels} == {f"sm_{name}" for name in ARCHITECTURES}
    # A stack frame is an array that the compiler could not keep in registers: as slow as a spill.
    in_memory = [kernel for kernel in kernels if kernel[2:] != ("0", "0", "0")]
    assert in_memory == []


def test_what_ops_include_agrees_with_the_headers_of_cuda(tmp_path):
    """Their host compiler sees CUDA's own headers, without what only nvcc knows and tests/cuda_on_cpu has; and torch's,
    whose declarations for CUDA are also where no CUDA build of it is."""
    ops = "".join(path.read_text(encoding="utf-8") for path in (CSRC / "cuda").glob("*.cpp"))
    headers = sorted(set(re.findall(r'#include "([^"/]+)"', ops)))
    assert "tensors.h" in headers and "low_rank_gradient_kernels.h" in headers
    source = tmp_path / "ops.cpp"
    source.write_text(
        "".join(f'#include "cuda/{name}"\n' for name in headers)
        + "cudaStream_t stream_of(minift::Tensor tensor) { return minift::cuda::OnDevice(tensor).stream; }\n"
    )
    flags = ["-std=c++20", "-DUSE_CUDA", STABLE_ABI]
    flags += [f"-I{path}" for path in (CSRC, *include_paths(), sysconfig.get_path("include"))]
    command = [NVCC, *flags, "-x", "c++", "-c", str(source), "-o", str(tmp_path / "ops.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
