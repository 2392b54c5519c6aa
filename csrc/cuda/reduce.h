// Sums and maxima over the threads of a warp and of a block, in an order that depends on nothing but their number:
// results have the same bits in every run. All threads must call these together.

#pragma once

#include "launch.h"

namespace minift::cuda {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Over groups of `lanes` neighbours (a power of two), each of which gets the result of its group.
template <class Operation, class T>
__device__ inline T reduce_warp(T value, int lanes = WARP) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = Operation()(value, __shfl_xor_sync(ALL_LANES, value, distance));
  }
  return value;
}

// The sums of COUNT values of each lane, a power of two up to the warp: a lane gets that of value
// lane / (WARP / COUNT). Half of the values go to the other half of the lanes at each step, which takes a quarter of
// the shuffles of COUNT sums.
template <int COUNT>
__device__ __forceinline__ float sum_warp_each(float (&values)[COUNT]) {
  static_assert(COUNT <= WARP && (COUNT & (COUNT - 1)) == 0);
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2) {
    int distance = half * (WARP / COUNT);
    bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i >= half) continue;
      float kept = upper ? values[half + i] : values[i], given = upper ? values[i] : values[half + i];
      values[i] = kept + __shfl_xor_sync(ALL_LANES, given, distance);
    }
  }
  return reduce_warp<Sum>(values[0], WARP / COUNT);
}

// Over a block of THREADS, a multiple of the warp; every thread gets the result.
template <class Operation, int THREADS, class T>
__device__ inline T reduce_block(T value) {
  constexpr int WARPS = THREADS / WARP;
  static_assert(THREADS % WARP == 0 && WARPS <= WARP && (WARPS & (WARPS - 1)) == 0);
  value = reduce_warp<Operation>(value);
  if (WARPS == 1) return value;
  __shared__ T of_warps[WARPS];
  int lane = threadIdx.x % WARP;
  __syncthreads();  // everybody has read the result of the last call
  if (lane == 0) of_warps[threadIdx.x / WARP] = value;
  __syncthreads();
  return reduce_warp<Operation>(of_warps[lane % WARPS], WARPS);
}

}  // namespace minift::cuda
