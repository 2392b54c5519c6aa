// A few tokens times an NF4 matrix on the GPU: x (T, in), W (out, in), y (T, out), and no dequantised copy of W.

#include "../nf4_tensors.h"

#include "nf4_gemv_kernels.h"
#include "tensors.h"

#include <optional>

namespace minift::cuda {
namespace {

Tensor nf4_gemv_op(const Tensor& x, const Tensor& codes, const Tensor& scales,
                   const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                   const std::optional<Tensor>& nested_map, int64_t block_size) {
  nf4::Scales block_scales = nf4_scales(scales, nested_absmax, offset, nested_map);
  int64_t features = check_nf4_gemv(x, codes, scales, block_size);
  Tensor x_rows = with_rows(x), y = torch::stable::new_empty(x, {x.size(0), features});
  OnDevice on(x, codes, scales, nested_absmax, offset, nested_map);
  dispatch_dtype(x, "nf4_gemv", [&](auto element) {
    using T = decltype(element);
    nf4_gemv(rows<const T>(x_rows), nf4_codes(codes), block_scales, block_size, features,
             static_cast<T*>(y.data_ptr()), on.stream);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("nf4_gemv", TORCH_BOX(&nf4_gemv_op));
}

}  // namespace minift::cuda
