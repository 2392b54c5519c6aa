// Every segment of tokens with its own low-rank update, on the CPU: y (T, out) += (x Aᵀ) B, with A (R, in) and B
// (R, out) the factors of all adapters on top of each other, of which a segment uses some rows.

#include "../sgmv_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

constexpr int64_t SGMV_TOKENS = 4;  // that share what is read of A and B

#define MINIFT_KERNELS "sgmv_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

void sgmv_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& ranks,
           const Tensor& bounds, const Tensor& choice) {
  std::vector<SgmvSegment> segments = sgmv_segments(y, x, A, B, ranks, bounds, choice);
  int64_t most = largest_rank(segments);
  if (segments.empty()) return;

  Tensor x_rows = with_rows(x);
  dispatch_dtype(x, "sgmv", [&](auto element) {
    using T = decltype(element);
    Rows<const T> in = rows<const T>(x_rows);
    Rows<T> out = rows<T>(y);
    const T *a = static_cast<const T*>(A.data_ptr()), *b = static_cast<const T*>(B.data_ptr());
    auto* kernel = MINIFT_KERNEL(sgmv<T>);
    parallel_rows(x.size(0), most * (x.size(1) + y.size(1)) / 8 + 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(SGMV_TOKENS * most);
      for (const auto& [first_token, end_token, first, rank] : segments) {
        int64_t from = std::max<int64_t>(begin, first_token), to = std::min<int64_t>(end, end_token);
        if (from >= to) continue;
        kernel(in, a + first * in.width, b + first * out.width, out, from, to, rank, scratch.data());
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("sgmv_", TORCH_BOX(&sgmv_));
}

}  // namespace minift
