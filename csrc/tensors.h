// Between torch tensors and kernels on raw pointers, for every device: dtypes, tensors seen as rows, and checks.

#pragma once

#include "rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace minift {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

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

}  // namespace minift
