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

// dgate may be dy: every element is read before it is written, by one thread. y has no elements, or all.
Tensor backward_into(const Tensor& dgate, const Tensor& y, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  OnDevice on(gate, up, dy);
  Tensor dy_rows = with_rows(dy), gate_rows = with_rows(gate), up_rows = with_rows(up), dup = new_like(gate);
  dispatch_dtype(gate, "swiglu_backward", [&](auto element) {
    using T = decltype(element);
    Rows<T> dgate_rows = rows<T>(dgate), dup_rows = rows<T>(dup), y_rows = rows<T>(y);
    swiglu_backward(rows<const T>(dy_rows), rows<const T>(gate_rows), rows<const T>(up_rows), dgate_rows, dup_rows,
                    y.numel() > 0 ? &y_rows : nullptr, on.stream);
  });
  return dup;
}

std::tuple<Tensor, Tensor> swiglu_backward_op(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu_backward(dy, gate, up);
  Tensor dgate = new_like(gate);
  return {dgate, backward_into(dgate, y_if(false, gate), dy, gate, up)};
}

std::tuple<Tensor, Tensor> swiglu_backward_in_place_op(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                       bool need_y) {
  check_swiglu_backward_in_place(dy, gate, up);
  Tensor y = y_if(need_y, gate);
  Tensor dup = backward_into(dy, y, dy, gate, up);
  return {dup, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_op));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_op));
  m.impl("swiglu_backward_", TORCH_BOX(&swiglu_backward_in_place_op));
}

}  // namespace minift::cuda
