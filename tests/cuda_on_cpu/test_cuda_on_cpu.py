"""What cuda_runtime.h beside this refuses, each by a kernel that does just that, and what it computes right."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu import library

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler")

PROGRAM = """
#include "cuda_runtime.h"
#include <cstdio>
struct alignas(16) Sixteen { float at[4]; };
__global__ void kernel(float* memory) { KERNEL }
int main() {
  alignas(16) static float memory[256];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  try {
    cudaLaunchKernelEx(&config, kernel, memory);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  for (int i = 0; i < 3; ++i) std::printf("%g ", memory[i]);
}
"""


@pytest.mark.parametrize(
    "kernel, says",
    [
        ("if (threadIdx.x < 63) __syncthreads();", "wait at a barrier or in a shuffle"),
        ("if (threadIdx.x != 5) __shfl_xor_sync(0xffffffffu, 1, 1);", "wait at a barrier or in a shuffle"),
        ("__shfl_xor_sync(0xffu, 1, 1);", "a part of the warp"),
        ("*reinterpret_cast<Sixteen*>(memory + 1) = Sixteen{};", "misaligned"),
        ("memory[1 << 30] = 1;", "beyond a tensor"),
        ("__shared__ float few[8]; few[threadIdx.x] = 1;", "beyond an array"),
    ],
)
def test_is_refused(tmp_path, kernel, says):
    assert says in run(tmp_path, kernel)


def test_threads_meet_at_barriers_and_in_shuffles(tmp_path):
    """Thread i of 64 writes i, reads its neighbour's across warps after a barrier, and sums over its warp: 32 + 1 .. 63
    and 0 in the second, whichever thread runs first; the last block is the one whose results stay."""
    kernel = """
      __shared__ float shared[64];
      for (int round = 0; round < 3; ++round) {
        __syncthreads();
        shared[threadIdx.x] = threadIdx.x + 100 * round + 1000 * blockIdx.x;
        __syncthreads();
        float sum = shared[(threadIdx.x + 1) % 64] - 100 * round - 1000 * blockIdx.x;
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = sum;
      }
      memory[2] += 1;
    """
    assert run(tmp_path, kernel) == f"{sum(range(1, 33))} {sum(range(33, 64))} 128 "


def run(folder: Path, kernel: str) -> str:
    """What the program prints."""
    (folder / "kernel.cpp").write_text(PROGRAM.replace("KERNEL", kernel))
    command = [library.compiler(), *library.FLAGS, f"-I{Path(library.__file__).parent}", str(folder / "kernel.cpp")]
    subprocess.run([*command, "-o", str(folder / "kernel")], check=True)
    return subprocess.run([folder / "kernel"], check=True, capture_output=True, text=True).stdout
