// Every segment of tokens with its own low-rank update, on the GPU; ranks, bounds and choice stay on the host.

#include "../sgmv_tensors.h"

#include "sgmv_kernels.h"
#include "tensors.h"

namespace minift::cuda {
namespace {

void sgmv_op(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& ranks,
             const Tensor& bounds, const Tensor& choice) {
  std::vector<SgmvSegment> segments = sgmv_segments(y, x, A, B, ranks, bounds, choice);
  if (segments.empty()) return;
  OnDevice on(y, x, A, B);
  int64_t most = largest_rank(segments);
  Tensor x_rows = with_rows(x), hidden = torch::stable::new_empty(x, {x.size(0), most}, ScalarType::Float);
  dispatch_dtype(x, "sgmv", [&](auto element) {
    using T = decltype(element);
    sgmv(rows<const T>(x_rows), static_cast<const T*>(A.data_ptr()), static_cast<const T*>(B.data_ptr()), rows<T>(y),
         segments.data(), static_cast<int64_t>(segments.size()), static_cast<float*>(hidden.data_ptr()), most,
         on.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("sgmv_", TORCH_BOX(&sgmv_op));
}

}  // namespace minift::cuda
