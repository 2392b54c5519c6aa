// Rotary position embedding on the CPU: x (T, H, E), cos and sin (T, E / 2) in fp32.

#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "rope_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: x must be (tokens, heads, an even head dimension)");
  check_same(cos, sin, "rope: cos and sin must have one shape and dtype");
  STD_TORCH_CHECK(cos.scalar_type() == ScalarType::Float && cos.dim() == 2 && cos.size(0) == x.size(0) &&
                      cos.size(1) == x.size(2) / 2,
                  "rope: cos and sin must be float32 of shape (tokens, head dimension / 2)");
  Tensor x_rows = with_rows(x), cos_rows = torch::stable::contiguous(cos), sin_rows = torch::stable::contiguous(sin);
  Tensor y = new_like(x);
  dispatch_dtype(x, "rope", [&](auto element) {
    using T = decltype(element);
    Rows<const T> in = rows<const T>(x_rows);
    Rows<T> out = rows<T>(y);
    const float* c = static_cast<const float*>(cos_rows.data_ptr());
    const float* s = static_cast<const float*>(sin_rows.data_ptr());
    auto* kernel = MINIFT_KERNEL(rope<T>);
    parallel_rows(x.size(0), x.size(1) * x.size(2), [&](int64_t begin, int64_t end) {
      kernel(in, c, s, inverse ? -1.0f : 1.0f, out, x.size(1), begin, end);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
}

}  // namespace minift
