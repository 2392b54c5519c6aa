// Rotary position embedding on the GPU: x (T, H, E), cos and sin (T, E / 2) in fp32.

#include "../rope_tensors.h"

#include "rope_kernels.h"
#include "tensors.h"

namespace minift::cuda {
namespace {

Tensor rope_op(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  check_rope(x, cos, sin);
  OnDevice on(x, cos, sin);
  Tensor x_rows = with_rows(x), cos_rows = torch::stable::contiguous(cos), sin_rows = torch::stable::contiguous(sin);
  Tensor y = new_like(x);
  dispatch_dtype(x, "rope", [&](auto element) {
    using T = decltype(element);
    rope(rows<const T>(x_rows), static_cast<const float*>(cos_rows.data_ptr()),
         static_cast<const float*>(sin_rows.data_ptr()), inverse, x.size(1), static_cast<T*>(y.data_ptr()), on.stream);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("rope", TORCH_BOX(&rope_op));
}

}  // namespace minift::cuda
