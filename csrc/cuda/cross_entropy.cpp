// Cross entropy of rows of logits (N, V) on the GPU, which become its gradient in place.

#include "../cross_entropy_tensors.h"

#include "cross_entropy_kernels.h"
#include "tensors.h"

namespace minift::cuda {
namespace {

Tensor cross_entropy_op(const Tensor& logits, const Tensor& targets, bool need_gradient) {
  check_cross_entropy(logits, targets);
  OnDevice on(logits, targets);
  Tensor losses = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  dispatch_dtype(logits, "cross_entropy_", [&](auto element) {
    cross_entropy(static_cast<decltype(element)*>(logits.data_ptr()), static_cast<const int64_t*>(targets.data_ptr()),
                  logits.size(0), logits.size(1), need_gradient, static_cast<float*>(losses.data_ptr()), on.stream);
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_op));
}

}  // namespace minift::cuda
