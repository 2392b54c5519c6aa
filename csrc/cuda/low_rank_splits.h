// Sums of which every split (a part of the tokens, or of a width) has computed its own part: added up in order, rounded
// once. How many splits there are is a function of sizes alone, so results have the same bits in every run.

#pragma once

#include "elements.h"
#include "launch.h"

#include <algorithm>
#include <vector>

namespace minift::cuda::low_rank {

constexpr int ADD_THREADS = 256;

// One for each multiprocessor of an H100. Tests want few, so that small matrices have both one split and several.
#if !defined(MINIFT_WANTED_BLOCKS)
#define MINIFT_WANTED_BLOCKS 132
#endif
constexpr int64_t WANTED_BLOCKS = MINIFT_WANTED_BLOCKS;

// For kernels that have `blocks` of them without splits, which take at least one of `pieces` each.
inline int64_t splits_for(int64_t blocks, int64_t pieces) {
  return std::max<int64_t>(1, std::min(WANTED_BLOCKS / std::max<int64_t>(1, blocks), pieces));
}

// `count` sums in lines of `length`, which are `stride` apart where they go to. Those of the next split come
// split_stride later.
struct SplitSum {
  const float* sums;
  void* data;
  int64_t count, length, stride;
  int64_t splits, split_stride;
  ElementType type;
};

struct SplitSums {
  static constexpr int MOST = 56;

  SplitSum at[MOST];
};
static_assert(sizeof(SplitSums) <= 3900);

namespace {

__global__ void __launch_bounds__(ADD_THREADS) add_splits(const __grid_constant__ SplitSums all) {
  const SplitSum& sums = all.at[blockIdx.y];
  int64_t step = int64_t{gridDim.x} * ADD_THREADS;
  for (int64_t i = int64_t{blockIdx.x} * ADD_THREADS + threadIdx.x; i < sums.count; i += step) {
    float sum = 0.0f;
    for (int64_t split = 0; split < sums.splits; ++split) sum += sums.sums[split * sums.split_stride + i];
    int64_t to = i / sums.length * sums.stride + i % sums.length;
    switch (sums.type) {
      case ElementType::FLOAT: static_cast<float*>(sums.data)[to] = sum; break;
      case ElementType::BF16: static_cast<Bf16*>(sums.data)[to] = from_float<Bf16>(sum); break;
      case ElementType::FP16: static_cast<Fp16*>(sums.data)[to] = from_float<Fp16>(sum); break;
    }
  }
}

// In one launch, if there are no more than it takes.
inline void add_up(const char* op, const std::vector<SplitSum>& sums, cudaStream_t stream) {
  for (size_t done = 0; done < sums.size(); done += SplitSums::MOST) {
    unsigned count = std::min<size_t>(SplitSums::MOST, sums.size() - done);
    SplitSums some{};
    std::copy_n(sums.begin() + done, count, some.at);
    int64_t largest = 0;
    for (unsigned i = 0; i < count; ++i) largest = std::max(largest, some.at[i].count);
    launch(op, add_splits, dim3(blocks_for(largest, ADD_THREADS), count), ADD_THREADS, stream, some);
  }
}

}  // namespace

}  // namespace minift::cuda::low_rank
