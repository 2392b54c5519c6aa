// Between tensors and the segmented low-rank product of every device: checks, and segments from their numbers.

#pragma once

#include "sgmv.h"
#include "tensors.h"

#include <algorithm>
#include <vector>

namespace minift {

// The segments that change anything. y (T, out) += (x Aᵀ) B; the numbers are on the host, whatever the device.
inline std::vector<SgmvSegment> sgmv_segments(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                                              const Tensor& ranks, const Tensor& bounds, const Tensor& choice) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && A.dim() == 2 && B.dim() == 2 && ranks.dim() == 2,
                  "sgmv: all tensors but bounds and choice must have two dimensions");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(1) == A.size(1) && y.size(1) == B.size(1) && A.size(0) == B.size(0),
                  "sgmv: x (T, in), y (T, out), A (R, in) and B (R, out) do not fit");
  bool one_dtype = x.scalar_type() == y.scalar_type() && x.scalar_type() == A.scalar_type() &&
                   x.scalar_type() == B.scalar_type();
  STD_TORCH_CHECK(one_dtype, "sgmv: x, y, A and B must have one dtype");
  STD_TORCH_CHECK(A.is_contiguous() && B.is_contiguous(), "sgmv: A and B must be contiguous");
  STD_TORCH_CHECK(y.stride(1) == 1 || y.size(1) == 1, "sgmv: rows of y must be contiguous");
  auto numbers = [](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.is_cpu(),
                    "sgmv: ranks, bounds and choice must be contiguous int32 on the CPU");
    return static_cast<const int32_t*>(tensor.data_ptr());
  };
  const int32_t *rows_of = numbers(ranks), *bound = numbers(bounds), *chosen = numbers(choice);
  int64_t num_segments = choice.numel();
  STD_TORCH_CHECK(bounds.numel() == num_segments + 1 && ranks.size(1) == 2,
                  "sgmv: bounds, choice and ranks do not fit");
  std::vector<SgmvSegment> segments;
  for (int64_t s = 0; s < num_segments; ++s) {
    STD_TORCH_CHECK(bound[s] <= bound[s + 1] && chosen[s] >= 0 && chosen[s] < ranks.size(0), "sgmv: no such segment");
    int32_t first = rows_of[2 * chosen[s]], stop = rows_of[2 * chosen[s] + 1];
    STD_TORCH_CHECK(0 <= first && first <= stop && stop <= A.size(0), "sgmv: ranks are beyond the factors");
    if (bound[s] < bound[s + 1] && first < stop) segments.push_back({bound[s], bound[s + 1], first, stop - first});
  }
  STD_TORCH_CHECK(num_segments == 0 || (bound[0] >= 0 && bound[num_segments] <= x.size(0)),
                  "sgmv: bounds are beyond the tokens");
  return segments;
}

inline int64_t largest_rank(const std::vector<SgmvSegment>& segments) {
  int64_t largest = 0;
  for (const SgmvSegment& segment : segments) largest = std::max<int64_t>(largest, segment.rank);
  return largest;
}

}  // namespace minift
