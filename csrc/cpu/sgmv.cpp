// Every segment of tokens with its own low-rank update, on the CPU: y (T, out) += (x Aᵀ) B, with A (R, in) and B
// (R, out) the factors of all adapters on top of each other, of which a segment uses some rows.

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

// The numbers of a tensor of int32, checked.
const int32_t* numbers(const Tensor& tensor, const char* message) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.is_cpu(), message);
  return static_cast<const int32_t*>(tensor.data_ptr());
}

void sgmv_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& ranks,
           const Tensor& bounds, const Tensor& choice) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && A.dim() == 2 && B.dim() == 2 && ranks.dim() == 2,
                  "sgmv: all tensors but bounds and choice must have two dimensions");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(1) == A.size(1) && y.size(1) == B.size(1) && A.size(0) == B.size(0),
                  "sgmv: x (T, in), y (T, out), A (R, in) and B (R, out) do not fit");
  bool one_dtype = x.scalar_type() == y.scalar_type() && x.scalar_type() == A.scalar_type() &&
                   x.scalar_type() == B.scalar_type();
  STD_TORCH_CHECK(one_dtype, "sgmv: x, y, A and B must have one dtype");
  STD_TORCH_CHECK(A.is_contiguous() && B.is_contiguous(), "sgmv: A and B must be contiguous");
  STD_TORCH_CHECK(y.stride(1) == 1 || y.size(1) == 1, "sgmv: rows of y must be contiguous");
  const char* kind = "sgmv: ranks, bounds and choice must be contiguous int32 on the CPU";
  const int32_t *rows_of = numbers(ranks, kind), *bound = numbers(bounds, kind), *chosen = numbers(choice, kind);
  int64_t num_segments = choice.numel(), num_tokens = x.size(0), most = 0;
  STD_TORCH_CHECK(bounds.numel() == num_segments + 1 && ranks.size(1) == 2, "sgmv: bounds, choice and ranks do not fit");
  for (int64_t s = 0; s < num_segments; ++s) {
    STD_TORCH_CHECK(bound[s] <= bound[s + 1] && chosen[s] >= 0 && chosen[s] < ranks.size(0), "sgmv: no such segment");
    int64_t first = rows_of[2 * chosen[s]], stop = rows_of[2 * chosen[s] + 1];
    STD_TORCH_CHECK(0 <= first && first <= stop && stop <= A.size(0), "sgmv: ranks are beyond the factors");
    most = std::max(most, stop - first);
  }
  STD_TORCH_CHECK(num_segments == 0 || (bound[0] >= 0 && bound[num_segments] <= num_tokens),
                  "sgmv: bounds are beyond the tokens");
  if (most == 0) return;

  Tensor x_rows = with_rows(x);
  dispatch_dtype(x, "sgmv", [&](auto element) {
    using T = decltype(element);
    Rows<const T> in = rows<const T>(x_rows);
    Rows<T> out = rows<T>(y);
    const T *a = static_cast<const T*>(A.data_ptr()), *b = static_cast<const T*>(B.data_ptr());
    auto* kernel = MINIFT_KERNEL(sgmv<T>);
    parallel_rows(num_tokens, most * (x.size(1) + y.size(1)) / 8 + 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(SGMV_TOKENS * most);
      for (int64_t s = 0; s < num_segments; ++s) {
        int64_t first = rows_of[2 * chosen[s]], rank = rows_of[2 * chosen[s] + 1] - first;
        int64_t from = std::max<int64_t>(begin, bound[s]), to = std::min<int64_t>(end, bound[s + 1]);
        if (rank == 0 || from >= to) continue;
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
