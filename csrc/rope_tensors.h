// What the rotary position embedding demands of its tensors on every device.

#pragma once

#include "tensors.h"

namespace minift {

inline void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: x must be (tokens, heads, an even head dimension)");
  check_same(cos, sin, "rope: cos and sin must have one shape and dtype");
  STD_TORCH_CHECK(cos.scalar_type() == ScalarType::Float && cos.dim() == 2 && cos.size(0) == x.size(0) &&
                      cos.size(1) == x.size(2) / 2,
                  "rope: cos and sin must be float32 of shape (tokens, head dimension / 2)");
}

}  // namespace minift
