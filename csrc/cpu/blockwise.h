// 8-bit moments as the kernels see them; minift/ops/blockwise.py says what the tables hold.

#pragma once

#include <cstdint>

namespace minift {

constexpr int64_t BLOCK = 256;

struct DynamicMap {
  const uint32_t* values;   // 256, bit patterns of fp32
  const uint32_t* buckets;  // code << 17 | border
};

struct QuantizedMoments {
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;
  DynamicMap signed_map, unsigned_map;
};

}  // namespace minift
