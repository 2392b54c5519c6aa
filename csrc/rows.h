// What kernels see of tensors, on every device: element types and strided rows. No torch, and nothing but plain data.

#pragma once

#include "host_device.h"

#include <cstdint>

namespace minift {

// Bit patterns; arithmetic happens in fp32 (cpu/vector.h and cuda/elements.h convert).
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

// Of elements whose type is not known when a kernel is compiled.
enum class ElementType : int { FLOAT, BF16, FP16 };

// `count` rows of `width` adjacent elements. Row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride:
// two strides describe a slice of a fused projection, and heads inside tokens, without a copy.
template <class T>
struct Rows {
  T* data;
  int64_t count, width, inner, outer_stride, inner_stride;

  MINIFT_HOST_DEVICE T* operator[](int64_t i) const {
    return inner == 1 ? data + i * outer_stride : data + (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
  MINIFT_HOST_DEVICE bool contiguous() const { return inner == 1 && outer_stride == width; }
};

}  // namespace minift
