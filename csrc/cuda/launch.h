// Launching kernels: how many blocks, and an exception with a name if CUDA refuses.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace minift::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// More blocks than every multiprocessor can hold at once; kernels go through the rest of their work in a loop. Tests
// build with a few, so that small tensors go through it as well.
#if !defined(MINIFT_MAX_BLOCKS)
#define MINIFT_MAX_BLOCKS (1 << 16)
#endif
constexpr int64_t MAX_BLOCKS = MINIFT_MAX_BLOCKS;

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return static_cast<unsigned>(std::min(MAX_BLOCKS, (items + items_per_block - 1) / items_per_block));
}

// Those that the GPU holds at once, `each` of them on a multiprocessor.
inline unsigned resident_blocks(int each) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return static_cast<unsigned>(each * multiprocessors);
}

inline int log2_of(int64_t power_of_two) {
  int log2 = 0;
  while (int64_t{1} << log2 < power_of_two) ++log2;
  return log2;
}

// `op` names the op in the message. Nothing is launched for an empty grid.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA could not launch its kernel: " + cudaGetErrorString(error));
  }
}

}  // namespace minift::cuda
