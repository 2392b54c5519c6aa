// SwiGLU on the GPU: gate and up of any shape, rows may be strided (the two halves of a fused projection).

#include "../swiglu_tensors.h"

#include "swiglu_kernels.h"
#include "tensors.h"

#include <tuple>

namespace minift::cuda {
namespace {

Tensor swiglu_op(const Tensor& gate, const Tensor& up) {
  check_swiglu(gate, up);
  OnDevice on(gate, up);
  Tensor gate_rows = with_rows(gate), up_rows = with_rows(up), y = new_like(gate);
  dispatch_dtype(gate, "swiglu", [&](auto element) {
    using T = decltype(element);
    swiglu(rows<const T>(gate_rows), rows<const T>(up_rows), rows<T>(y), on.stream);
  });
  return y;
}

// dgate may be dy: every element is read before it is written, by one thread.
Tensor backward_into(const Tensor& dgate, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  OnDevice on(gate, up, dy);
  Tensor dy_rows = with_rows(dy), gate_rows = with_rows(gate), up_rows = with_rows(up), dup = new_like(gate);
  dispatch_dtype(gate, "swiglu_backward", [&](auto element) {
    using T = decltype(element);
    swiglu_backward(rows<const T>(dy_rows), rows<const T>(gate_rows), rows<const T>(up_rows), rows<T>(dgate),
                    rows<T>(dup), on.stream);
  });
  return dup;
}

std::tuple<Tensor, Tensor> swiglu_backward_op(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu_backward(dy, gate, up);
  Tensor dgate = new_like(gate);
  return {dgate, backward_into(dgate, dy, gate, up)};
}

Tensor swiglu_backward_in_place_op(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu_backward_in_place(dy, gate, up);
  return backward_into(dy, dy, gate, up);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_op));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_op));
  m.impl("swiglu_backward_", TORCH_BOX(&swiglu_backward_in_place_op));
}

}  // namespace minift::cuda
