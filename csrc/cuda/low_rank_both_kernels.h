// Two products with one wide matrix in one pass over it: narrow = scale wide F, and gradient = wide^T h; launcher.

#pragma once

#include "low_rank_gradient_kernels.h"

namespace minift::cuda {

// Element (w, r) of the factor is at w * w_stride + r * r_stride. It is as wide as the gradient and has its rank.
struct RankAndGradient {
  FactorGradient gradient;  // with its wide matrix and h
  const Bf16* factor;
  int64_t w_stride, r_stride;
  float scale;
};

// Whether the kernel does this: no rank is above 16, whole packs everywhere, gradients with adjacent ranks.
bool is_one_pass(const std::vector<RankAndGradient>& terms);

// How many numbers of scratch that takes: a function of sizes alone.
int64_t one_pass_sums(const std::vector<RankAndGradient>& terms, int64_t tokens);

// narrow (tokens, sum of ranks): contiguous. sums: scratch.
void to_rank_and_gradients(const std::vector<RankAndGradient>& terms, int64_t tokens, Bf16* narrow, float* sums,
                           cudaStream_t stream);

}  // namespace minift::cuda
