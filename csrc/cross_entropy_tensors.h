// What the cross entropy of logits demands of its tensors on every device.

#pragma once

#include "tensors.h"

namespace minift {

inline void check_cross_entropy(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous(),
                  "cross_entropy_: logits must be contiguous (rows, vocabulary)");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.is_contiguous() &&
                      targets.size(0) == logits.size(0), "cross_entropy_: targets must be int64, one for each row");
}

}  // namespace minift
