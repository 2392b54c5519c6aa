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


@pytest.mark.parametrize(
    "name, kernels_of_packs",
    [
        ("rope", r"rotateI\w+?Lb1E"),
        ("swiglu", r"elementwiseILb1E"),
        ("dropout", r"elementwiseILb1E"),
        ("rms_norm", r"forwardI\w+?Lb[01]ELb1EEE|backwardI\w+?Lb[01]ELb1EEELb0E"),
    ],
)
def test_packs_are_moved_whole(name, kernels_of_packs):
    """In kernels that are told that packs are aligned, every access to global memory is of 16 bytes, or of a row's one
    fp32 number. The compiler takes structs apart and does not always put them together again."""
    ptx = compiled(CSRC / "cuda" / f"{name}_kernels.cu").result().ptx
    entries = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, flags=re.DOTALL)
    of_packs = [body for entry, body in entries if re.search(kernels_of_packs, entry)]
    accesses = {access for body in of_packs for access in re.findall(r"\b(?:ld|st)\.global\.[.\w]+", body)}
    assert {"ld.global.v4.u32", "st.global.v4.u32"} <= accesses
    assert accesses <= {f"{op}.global.{of}" for op in ("ld", "st") for of in ("v4.u32", "v4.f32", "f32")}


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
