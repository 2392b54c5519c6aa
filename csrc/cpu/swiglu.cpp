// SwiGLU on the CPU: gate and up of any shape, rows may be strided (the two halves of a fused projection).

#include "../swiglu_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#define MINIFT_KERNELS "swiglu_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

// Work is cut by elements when everything is contiguous, so that few long rows use every thread; else by rows.
template <class Function>
void parallel_spans(bool contiguous, int64_t count, int64_t width, const Function& function) {
  if (contiguous) {
    parallel_rows(count * width, 1, [&](int64_t begin, int64_t end) { function(0, begin, end - begin); });
  } else {
    parallel_rows(count, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) function(row, 0, width);
    });
  }
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_swiglu(gate, up);
  Tensor gate_rows = with_rows(gate), up_rows = with_rows(up), y = new_like(gate);
  dispatch_dtype(gate, "swiglu", [&](auto element) {
    using T = decltype(element);
    Rows<const T> g = rows<const T>(gate_rows), u = rows<const T>(up_rows);
    Rows<T> out = rows<T>(y);
    auto* kernel = MINIFT_KERNEL(swiglu<T>);
    parallel_spans(g.contiguous() && u.contiguous(), g.count, g.width, [&](int64_t row, int64_t at, int64_t count) {
      kernel(g[row] + at, u[row] + at, out[row] + at, count);
    });
  });
  return y;
}

// dgate may be dy: every element is read before it is written, by one thread. y has no elements, or all.
Tensor backward_into(const Tensor& dgate, const Tensor& y, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  Tensor dy_rows = with_rows(dy), gate_rows = with_rows(gate), up_rows = with_rows(up), dup = new_like(gate);
  dispatch_dtype(gate, "swiglu_backward", [&](auto element) {
    using T = decltype(element);
    Rows<const T> d = rows<const T>(dy_rows), g = rows<const T>(gate_rows), u = rows<const T>(up_rows);
    Rows<T> dg = rows<T>(dgate), du = rows<T>(dup);
    T* again = y.numel() > 0 ? static_cast<T*>(y.data_ptr()) : nullptr;
    auto* kernel = MINIFT_KERNEL(swiglu_backward<T>);
    bool contiguous = d.contiguous() && g.contiguous() && u.contiguous();
    parallel_spans(contiguous, g.count, g.width, [&](int64_t row, int64_t at, int64_t count) {
      T* y_at = again == nullptr ? nullptr : again + row * g.width + at;
      kernel(d[row] + at, g[row] + at, u[row] + at, dg[row] + at, du[row] + at, y_at, count);
    });
  });
  return dup;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check_swiglu_backward(dy, gate, up);
  Tensor dgate = new_like(gate);
  return {dgate, backward_into(dgate, y_if(false, gate), dy, gate, up)};
}

std::tuple<Tensor, Tensor> swiglu_backward_in_place(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                    bool need_y) {
  check_swiglu_backward_in_place(dy, gate, up);
  Tensor y = y_if(need_y, gate);
  Tensor dup = backward_into(dy, y, dy, gate, up);
  return {dup, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("swiglu_backward_", TORCH_BOX(&swiglu_backward_in_place));
}

}  // namespace minift
