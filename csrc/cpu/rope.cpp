// Rotary position embedding on the CPU: x (T, H, E), cos and sin (T, E / 2) in fp32.

#include "../rope_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "rope_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  check_rope(x, cos, sin);
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
