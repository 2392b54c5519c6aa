// Between tensors and the NF4 kernels: scales as the kernels read them, fp32 or bytes that are expanded one at a time,
// and checks.

#pragma once

#include "../nf4.h"
#include "rows.h"

#include <optional>

namespace minift {

struct Nf4Scales {
  const float* absmax;          // fp32 per block; null when double-quantised, and then:
  const uint8_t* bytes;         // per block
  const float* nested_absmax;   // per NESTED_BLOCK_SIZE blocks
  const float* map;             // what a byte stands for, 256 numbers
  float offset;

  __attribute__((always_inline)) float operator[](int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    float product = map[bytes[block]] * nested_absmax[block / nf4::NESTED_BLOCK_SIZE];
    __asm__("" : "+m"(product));  // rounded here, as bitsandbytes does, and not fused with the addition
    return product + offset;
  }

  __attribute__((always_inline)) void copy(int64_t first, int64_t count, float* to) const {
    if (absmax != nullptr) {
      __builtin_memcpy(to, absmax + first, count * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = (*this)[first + i];
    }
  }
};

inline void check_nf4_block_size(const char* op, int64_t block_size) {
  bool is_power_of_two = block_size > 0 && (block_size & (block_size - 1)) == 0;
  STD_TORCH_CHECK(is_power_of_two && block_size >= nf4::SMALLEST_BLOCK_SIZE && block_size <= nf4::LARGEST_BLOCK_SIZE,
                  op, ": block_size must be a power of two between 32 and 4096, but is ", block_size);
}

// Pointer to the elements of a tensor that must be contiguous and have this dtype.
template <class T>
T* elements_of(const Tensor& tensor, ScalarType dtype, const char* message) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), message);
  return static_cast<T*>(tensor.data_ptr());
}

inline Nf4Scales nf4_scales(const Tensor& scales, const std::optional<Tensor>& nested_absmax,
                            const std::optional<Tensor>& offset, const std::optional<Tensor>& nested_map) {
  if (!nested_absmax) {
    return {elements_of<const float>(scales, ScalarType::Float, "nf4: absmax must be contiguous float32"),
            nullptr, nullptr, nullptr, 0.0f};
  }
  STD_TORCH_CHECK(offset && nested_map && nested_map->numel() == 256 && offset->numel() == 1,
                  "nf4: double-quantised scales need offset (1 element) and nested_map (256)");
  int64_t num_groups = (scales.numel() + nf4::NESTED_BLOCK_SIZE - 1) / nf4::NESTED_BLOCK_SIZE;
  STD_TORCH_CHECK(nested_absmax->numel() == num_groups, "nf4: nested_absmax must have one element per 256 scales");
  return {nullptr, elements_of<const uint8_t>(scales, ScalarType::Byte, "nf4: scales must be contiguous uint8"),
          elements_of<const float>(*nested_absmax, ScalarType::Float, "nf4: nested_absmax must be contiguous float32"),
          elements_of<const float>(*nested_map, ScalarType::Float, "nf4: nested_map must be contiguous float32"),
          *elements_of<const float>(*offset, ScalarType::Float, "nf4: offset must be float32")};
}

}  // namespace minift
