// Cross entropy of rows of logits (N, V) on the CPU, which become its gradient in place.
//
// Every thread goes through its rows one by one: a row and its exponentials in fp32 stay in its second level of cache.

#include "../cross_entropy_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#define MINIFT_KERNELS "cross_entropy_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

Tensor cross_entropy_(const Tensor& logits, const Tensor& targets, bool need_gradient) {
  check_cross_entropy(logits, targets);
  int64_t count = logits.size(0), width = logits.size(1);
  const int64_t* target = static_cast<const int64_t*>(targets.data_ptr());
  for (int64_t row = 0; row < count; ++row) {
    STD_TORCH_CHECK(target[row] >= 0 && target[row] < width, "cross_entropy_: a target is outside the vocabulary");
  }
  Tensor losses = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  float* loss = static_cast<float*>(losses.data_ptr());
  dispatch_dtype(logits, "cross_entropy_", [&](auto element) {
    using T = decltype(element);
    T* data = static_cast<T*>(logits.data_ptr());
    auto* kernel = MINIFT_KERNEL(cross_entropy<T>);
    parallel_rows(count, width, [&](int64_t begin, int64_t end) {
      std::vector<float> powers(need_gradient ? width : 0);
      for (int64_t row = begin; row < end; ++row) {
        loss[row] = kernel(data + row * width, width, target[row], need_gradient ? powers.data() : nullptr);
      }
    });
  });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace minift
