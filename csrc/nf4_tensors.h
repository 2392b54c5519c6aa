// Between tensors and the NF4 kernels of every device: scales, and checks.

#pragma once

#include "nf4.h"
#include "tensors.h"

#include <optional>

namespace minift {

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

inline nf4::Scales nf4_scales(const Tensor& scales, const std::optional<Tensor>& nested_absmax,
                            const std::optional<Tensor>& offset, const std::optional<Tensor>& nested_map) {
  if (!nested_absmax) {
    return {elements_of<const float>(scales, ScalarType::Float, "nf4: absmax must be contiguous float32"),
            nullptr, nullptr, nullptr, nullptr};
  }
  STD_TORCH_CHECK(offset && nested_map && nested_map->numel() == 256 && offset->numel() == 1,
                  "nf4: double-quantised scales need offset (1 element) and nested_map (256)");
  int64_t num_groups = (scales.numel() + nf4::NESTED_BLOCK_SIZE - 1) / nf4::NESTED_BLOCK_SIZE;
  STD_TORCH_CHECK(nested_absmax->numel() == num_groups, "nf4: nested_absmax must have one element per 256 scales");
  return {nullptr, elements_of<const uint8_t>(scales, ScalarType::Byte, "nf4: scales must be contiguous uint8"),
          elements_of<const float>(*nested_absmax, ScalarType::Float, "nf4: nested_absmax must be contiguous float32"),
          elements_of<const float>(*nested_map, ScalarType::Float, "nf4: nested_map must be contiguous float32"),
          elements_of<const float>(*offset, ScalarType::Float, "nf4: offset must be float32")};
}

inline const uint8_t* nf4_codes(const Tensor& codes) {
  return elements_of<const uint8_t>(codes, ScalarType::Byte, "nf4: codes must be contiguous uint8");
}

// Of nf4_dequantize. Row r of `out` becomes elements [start + r * stride, start + r * stride + width): one row for a
// range of the flat weight, several for a range of its columns. Rows start and end at the border of a block; a single
// one may also end with the weight.
inline void check_nf4_rows(const Tensor& out, const Tensor& codes, const Tensor& scales, int64_t block_size,
                           int64_t start, int64_t stride) {
  check_nf4_block_size("nf4_dequantize", block_size);
  STD_TORCH_CHECK(out.is_contiguous() && out.dim() == 2, "nf4_dequantize: out must be contiguous and 2-D");
  int64_t rows = out.size(0), width = out.size(1);
  if (rows == 0 || width == 0) return;
  int64_t last = start + (rows - 1) * stride + width;
  STD_TORCH_CHECK(start >= 0 && start % block_size == 0, "nf4_dequantize: start must be at the border of a block");
  STD_TORCH_CHECK(rows == 1 || (stride >= 0 && stride % block_size == 0 && width % block_size == 0),
                  "nf4_dequantize: stride and the width of out must be multiples of the block size");
  STD_TORCH_CHECK((last + 1) / 2 <= codes.numel() && (last + block_size - 1) / block_size <= scales.numel(),
                  "nf4_dequantize: codes or scales end before the last element that was asked for");
}

// Of nf4_gemv: x (tokens, in); returns the number of features (out) of the matrix.
inline int64_t check_nf4_gemv(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t block_size) {
  check_nf4_block_size("nf4_gemv", block_size);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) % block_size == 0,
                  "nf4_gemv: x must be (tokens, features) with a multiple of the block size as features");
  int64_t width = x.size(1), features = 2 * codes.numel() / width;
  STD_TORCH_CHECK(features * width == 2 * codes.numel() && features * width == block_size * scales.numel(),
                  "nf4_gemv: codes and scales must be those of a matrix with as many columns as x");
  return features;
}

}  // namespace minift
