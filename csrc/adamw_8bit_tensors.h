// Between tensors and the kernels of every device for AdamW with 8-bit moments.

#pragma once

#include "adamw_tensors.h"
#include "blockwise.h"

namespace minift {

inline int64_t num_moment_blocks(const Tensor& master) { return (master.numel() + BLOCK - 1) / BLOCK; }

// Moments and maps as the op's schema has them, checked.
inline QuantizedMoments quantized_moments(const Tensor& master, const Tensor& exp_avg_codes,
                                          const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_codes,
                                          const Tensor& exp_avg_sq_absmax, const Tensor& signed_values,
                                          const Tensor& signed_buckets, const Tensor& unsigned_values,
                                          const Tensor& unsigned_buckets) {
  auto check = [](const Tensor& tensor, ScalarType dtype, int64_t size, const char* message) {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                        tensor.size(0) == size,
                    message);
    return tensor.data_ptr();
  };
  auto codes = [&](const Tensor& tensor) {
    return static_cast<uint8_t*>(check(tensor, ScalarType::Byte, master.numel(),
                                       "adamw_8bit: codes must be contiguous uint8 of the shape of master"));
  };
  auto absmax = [&](const Tensor& tensor) {
    return static_cast<float*>(check(tensor, ScalarType::Float, num_moment_blocks(master),
                                     "adamw_8bit: absmax must be contiguous float32, one for every 256 elements"));
  };
  auto map = [&](const Tensor& values, const Tensor& buckets, int64_t num_buckets) -> DynamicMap {
    constexpr const char* MESSAGE = "adamw_8bit: not the tables of a dynamic map";
    return {static_cast<const uint32_t*>(check(values, ScalarType::Float, DYNAMIC_VALUES, MESSAGE)),
            static_cast<const uint32_t*>(check(buckets, ScalarType::Int, num_buckets, MESSAGE))};
  };
  return {codes(exp_avg_codes),
          codes(exp_avg_sq_codes),
          absmax(exp_avg_absmax),
          absmax(exp_avg_sq_absmax),
          map(signed_values, signed_buckets, Buckets<true>::COUNT),
          map(unsigned_values, unsigned_buckets, Buckets<false>::COUNT)};
}

}  // namespace minift
