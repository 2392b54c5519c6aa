// Low-rank products in bf16: wide (T, W), narrow (T, R), factors (W, R); launchers.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

#include <vector>

namespace minift::cuda {

// Rows `stride` apart, their elements adjacent.
struct Wide {
  Bf16* data;
  int64_t stride, width;

  bool operator==(const Wide& other) const {
    return data == other.data && stride == other.stride && width == other.width;
  }
};

// What belongs to one factor. narrow: rows narrow_stride apart, elements adjacent.
struct LowRankTerm {
  Bf16* narrow;
  int64_t narrow_stride, rank;
  const Bf16* factor;  // element (w, r) at w * factor_stride + r if ranks are adjacent, else at w + r * factor_stride
  int64_t factor_stride;
  bool ranks_adjacent;
  float scale;
};

// A wide matrix and what it is multiplied to, or made from; then perhaps with a bias (width), else null.
struct LowRankGroup {
  Wide wide;
  const Bf16* bias;
  std::vector<LowRankTerm> terms;
};

// Into how many parts to_rank cuts the widths, each of which is summed up on its own.
int64_t to_rank_splits(const std::vector<LowRankGroup>& groups, int64_t tokens);

// narrow = scale wide F for each term. The narrow matrices are columns of `narrow` (tokens, rank), which is contiguous;
// sums: scratch, as many numbers for each split if there are several.
void to_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, Bf16* narrow, int64_t rank, int64_t splits,
             float* sums, cudaStream_t stream);

// wide = bias + the sum of narrow F^T over its terms, which have at most FROM_RANK_TILES tiles of RANK_TILE ranks.
// (minift leaves more than four to cuBLAS, see ops/low_rank.py.)
constexpr int64_t RANK_TILE = 16, FROM_RANK_TILES = 16;
void from_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, cudaStream_t stream);

}  // namespace minift::cuda
