// Gradients of factors of low-rank products: launcher.

#pragma once

#include "low_rank_kernels.h"

namespace minift::cuda {

// gradient (width, rank) = wide^T narrow. Element (w, r) is at w * w_stride + r * r_stride of `gradient`; one of these
// strides is 1.
struct FactorGradient {
  Wide wide;
  const Bf16* narrow;
  int64_t narrow_stride, rank;
  void* gradient;
  ElementType type;
  int64_t w_stride, r_stride;
};

// How many parts of the tokens are summed up on their own: a function of these sizes alone.
int64_t gradient_splits(const std::vector<FactorGradient>& gradients, int64_t tokens);

// sums: scratch, for each split one number for each element of all gradients.
void factor_gradients(const std::vector<FactorGradient>& gradients, int64_t tokens, int64_t splits, float* sums,
                      cudaStream_t stream);

}  // namespace minift::cuda
