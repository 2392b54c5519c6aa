// Tables of 16 numbers in shared memory: each number has a bank of its own, so the lanes of a warp read any 32 of them
// in one cycle.

#pragma once

#include "launch.h"

namespace minift::cuda {

// An argument of a kernel, for the host's tables do not exist on the GPU.
struct Table {
  float at[16];

  template <int COUNT>
  explicit Table(const float (&numbers)[COUNT]) : at{} {
    for (int i = 0; i < COUNT; ++i) at[i] = numbers[i];
  }
};

// All threads of the block together.
__device__ __forceinline__ void fill(float (&shared)[16], const Table& table) {
  if (threadIdx.x < 16) shared[threadIdx.x] = table.at[threadIdx.x];
  __syncthreads();
}

}  // namespace minift::cuda
