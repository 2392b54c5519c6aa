// What dropout demands of its arguments on every device.

#pragma once

#include "tensors.h"

namespace minift {

inline void check_dropout(const Tensor& x, int64_t num_dropped) {
  STD_TORCH_CHECK(x.dim() >= 1, "dropout: x must have at least one dimension");
  STD_TORCH_CHECK(num_dropped >= 0 && num_dropped < 65536, "dropout: num_dropped must be in [0, 2^16)");
}

}  // namespace minift
