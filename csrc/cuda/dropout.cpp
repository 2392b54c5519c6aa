// Dropout with a mask made from a seed and the element's index, on the GPU: x of any shape, rows may be strided.

#include "../dropout_tensors.h"

#include "dropout_kernels.h"
#include "tensors.h"

namespace minift::cuda {
namespace {

Tensor dropout_op(const Tensor& x, int64_t seed, int64_t num_dropped) {
  check_dropout(x, num_dropped);
  OnDevice on(x);
  Tensor x_rows = with_rows(x), y = new_like(x);
  dispatch_dtype(x, "dropout", [&](auto element) {
    using T = decltype(element);
    dropout(rows<const T>(x_rows), static_cast<uint64_t>(seed), static_cast<uint32_t>(num_dropped), rows<T>(y),
            on.stream);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("dropout", TORCH_BOX(&dropout_op));
}

}  // namespace minift::cuda
