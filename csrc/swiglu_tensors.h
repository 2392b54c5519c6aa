// What SwiGLU demands of its tensors on every device.

#pragma once

#include "tensors.h"

namespace minift {

inline void check_swiglu(const Tensor& gate, const Tensor& up) {
  check_same(gate, up, "swiglu: gate and up must have one shape and dtype");
  STD_TORCH_CHECK(gate.dim() >= 1, "swiglu: gate must have at least one dimension");
}

inline void check_swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu(gate, up);
  check_same(dy, gate, "swiglu_backward: dy must have the shape and dtype of gate");
}

// Also of the op that writes dgate where dy is.
inline void check_swiglu_backward_in_place(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu_backward(dy, gate, up);
  STD_TORCH_CHECK(dy.is_contiguous(), "swiglu_backward_: dy must be contiguous");
}

// Where backward makes y again; without elements if nobody needs it.
inline Tensor y_if(bool needed, const Tensor& gate) {
  return needed ? new_like(gate) : torch::stable::new_empty(gate, {0});
}

}  // namespace minift
