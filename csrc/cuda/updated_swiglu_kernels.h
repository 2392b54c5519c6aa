// SwiGLU of a gate and an up, and its gradients of a dy, that lack their low-rank updates; launchers. bf16, contiguous
// (tokens, width), aligned to packs, as everything else here is: width and ranks are multiples of 8.

#pragma once

#include "low_rank_kernels.h"

namespace minift::cuda {

constexpr int64_t MOST_UPDATE_TILES = 4;  // of one matrix, of RANK_TILE ranks

// A matrix, which lacks the sum of narrow F^T over the terms.
struct Updated {
  const Bf16* data;
  std::vector<LowRankTerm> terms;
};

void updated_swiglu(const Updated& gate, const Updated& up, Bf16* y, int64_t tokens, int64_t width,
                    cudaStream_t stream);

// dgate may be dy's data. y, what forward gave, may be null.
void updated_swiglu_backward(const Updated& gate, const Updated& up, const Updated& dy, Bf16* dgate, Bf16* dup,
                             Bf16* y, int64_t tokens, int64_t width, cudaStream_t stream);

}  // namespace minift::cuda
