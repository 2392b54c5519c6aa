// Between torch tensors and kernels on raw pointers: element types, tensors seen as rows, and loops over rows on
// torch's own thread pool. Compiled for the baseline processor; kernels only read Rows.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace minift {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

// Bit patterns; arithmetic happens in fp32 (vector.h converts).
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

// Enough elements for one thread to be worth waking: about 10 microseconds of work.
constexpr int64_t GRAIN_ELEMENTS = 32768;

// `count` rows of `width` adjacent elements. Row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride:
// two strides describe a slice of a fused projection, and heads inside tokens, without a copy.
template <class T>
struct Rows {
  T* data;
  int64_t count, width, inner, outer_stride, inner_stride;

  T* operator[](int64_t i) const {
    return inner == 1 ? data + i * outer_stride : data + (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
  bool contiguous() const { return inner == 1 && outer_stride == width; }
};

// Shape of a tensor's rows with every pair of mergeable dimensions merged; more than two left: not describable.
struct RowLayout {
  int64_t count = 1, inner = 1, outer_stride = 0, inner_stride = 0;
  bool describable = true;
};

inline RowLayout row_layout(const Tensor& tensor) {
  RowLayout layout;
  int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) layout.describable = false;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // [0] is the innermost group of merged dimensions
  int group = -1;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    layout.count *= size;
    if (size == 1) continue;
    if (group >= 0 && stride == sizes[group] * strides[group]) {
      sizes[group] *= size;
    } else if (++group < 2) {
      sizes[group] = size;
      strides[group] = stride;
    } else {
      layout.describable = false;
      return layout;
    }
  }
  if (group < 1) {
    layout.outer_stride = group < 0 ? tensor.size(last) : strides[0];
  } else {
    layout.inner = sizes[0];
    layout.inner_stride = strides[0];
    layout.outer_stride = strides[1];
  }
  return layout;
}

// `tensor` itself if its rows can be described by Rows, else a contiguous copy (transposed or expanded gradients).
inline Tensor with_rows(const Tensor& tensor) {
  return row_layout(tensor).describable ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
Rows<T> rows(const Tensor& tensor) {
  RowLayout layout = row_layout(tensor);
  return {static_cast<T*>(tensor.data_ptr()), layout.count,        tensor.size(tensor.dim() - 1),
          layout.inner,                       layout.outer_stride, layout.inner_stride};
}

// Calls function(T{}) with the element type of `tensor`.
template <class Function>
auto dispatch_dtype(const Tensor& tensor, const char* op, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(Bf16{});
    case ScalarType::Half: return function(Fp16{});
    default: STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16");
  }
}

inline void check_same(const Tensor& a, const Tensor& b, const char* message) {
  bool same = a.scalar_type() == b.scalar_type() && a.dim() == b.dim();
  for (int64_t dim = 0; same && dim < a.dim(); ++dim) same = a.size(dim) == b.size(dim);
  STD_TORCH_CHECK(same, message);
}

// A new contiguous tensor of `like`'s shape and dtype.
inline Tensor new_like(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

// function(begin, end) over [0, count) in parallel; each item is `width` elements of work.
template <class Function>
void parallel_rows(int64_t count, int64_t width, const Function& function) {
  if (count == 0 || width == 0) return;
  int64_t grain = GRAIN_ELEMENTS / width + 1;
  torch::stable::parallel_for(0, count, grain, function);
}

}  // namespace minift
