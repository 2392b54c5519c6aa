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
#define MINE shared[threadIdx.x]
__global__ void kernel(float* memory) {
  __shared__ float shared[64];
  KERNEL
}
int main() {
  float* memory = static_cast<float*>(std::calloc(256, sizeof(float)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  try {
    cudaLaunchKernelEx(&config, kernel, memory);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  for (int i = 2; i < 256; ++i) memory[1] += memory[i];
  for (int i = 0; i < 2; ++i) std::printf("%g ", memory[i]);
}
"""


@pytest.mark.parametrize(
    "kernel, says",
    [
        ("if (threadIdx.x < 63) __syncthreads();", "wait at a barrier or in a shuffle"),
        ("if (threadIdx.x != 5) __shfl_xor_sync(0xffffffffu, 1, 1);", "wait at a barrier or in a shuffle"),
        ("__shfl_xor_sync(0xffu, 1, 1);", "a part of the warp"),
        ("*reinterpret_cast<Sixteen*>(memory + 1) = Sixteen{};", "misaligned"),
        ("memory[(1 << 30) + 64 * blockIdx.x + threadIdx.x] = 1;", "beyond a tensor"),
        ("__shared__ float few[8]; few[threadIdx.x] = 1;", "beyond an array"),
        ("memory[threadIdx.x] += 1;", "a race: "),  # of the two blocks
        ("if (blockIdx.x == 0) memory[threadIdx.x + 1] = memory[threadIdx.x];", "a race: "),
        ("if (blockIdx.x == 0) memory[0] = 1; else memory[threadIdx.x] = memory[0];", "a race: "),
        ("MINE = 1; if (shared[63 - threadIdx.x] < 0) memory[0] = 1;", "a race in shared memory"),
        ("MINE = 1; __syncwarp(); float other = shared[threadIdx.x ^ 32]; MINE = other;", "a race in shared memory"),
        ("float all = shared[0]; __syncwarp(); if (threadIdx.x == 40) shared[0] = all;", "a race in shared memory"),
    ],
)
def test_is_refused(tmp_path, kernel, says):
    assert says in run(tmp_path, kernel)


def test_threads_meet_at_barriers_and_in_shuffles(tmp_path):
    """Thread i of 64 writes i, reads its neighbour's across warps after a barrier, and sums over its warp: 1 .. 32 in
    the first and 33 .. 63 and 0 in the second, whichever thread runs first."""
    kernel = """
      for (int round = 0; round < 3; ++round) {
        __syncthreads();
        shared[threadIdx.x] = threadIdx.x + 100 * round + 1000 * blockIdx.x;
        __syncthreads();
        float sum = shared[(threadIdx.x + 1) % 64] - 100 * round - 1000 * blockIdx.x;
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (threadIdx.x == 0 && blockIdx.x == 1) memory[0] = sum;
        if (threadIdx.x == 32 && blockIdx.x == 1) memory[2] = sum;
      }
      memory[64 + 64 * blockIdx.x + threadIdx.x] = 1000;
    """
    assert run(tmp_path, kernel) == f"{sum(range(1, 33))} {sum(range(33, 64)) + 128 * 1000} "


def test_what_is_in_order_is_no_race(tmp_path):
    """By barriers; in a warp by shuffles; other bytes of a word; and blocks that follow each other in shared memory."""
    kernel = """
      MINE = threadIdx.x;
      __syncwarp();
      float sum = MINE + shared[threadIdx.x ^ 1] + shared[threadIdx.x / 32 * 32];
      __syncthreads();
      MINE = sum + shared[threadIdx.x];
      reinterpret_cast<uint8_t*>(memory + 64)[64 * blockIdx.x + threadIdx.x] = 0;
      __syncthreads();
      if (blockIdx.x == 0) memory[threadIdx.x] = 0 * shared[63 - threadIdx.x];
    """
    assert run(tmp_path, kernel) == "0 0 "


def run(folder: Path, kernel: str) -> str:
    """What the program prints."""
    (folder / "kernel.cpp").write_text(PROGRAM.replace("KERNEL", kernel))
    command = [library.compiler(), *library.FLAGS, f"-I{Path(library.__file__).parent}", "-c", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    subprocess.run([library.compiler(), "kernel.o", "-o", "kernel"], cwd=folder, check=True)
    return subprocess.run([folder / "kernel"], check=True, capture_output=True, text=True).stdout
