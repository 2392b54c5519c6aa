// 8-bit moments as the kernels of every device see them; minift/ops/blockwise.py says what the tables hold.

#pragma once

#include "host_device.h"

#include <cstdint>

namespace minift {

constexpr int64_t BLOCK = 256;
constexpr int64_t DYNAMIC_VALUES = 256;

struct DynamicMap {
  const uint32_t* values;   // DYNAMIC_VALUES, bit patterns of fp32
  const uint32_t* buckets;  // code << CODE_SHIFT | border
};

// Buckets are runs of 2^LOW_BITS floats from SMALLEST to ONE; signed maps have those below zero behind those above.
template <bool SIGNED>
struct Buckets {
  static constexpr int LOW_BITS = SIGNED ? 17 : 16, CODE_SHIFT = 17;
  static constexpr uint32_t SMALLEST = 0x34000000, ONE = 0x3f800000;  // 2^-23 and 1
  static constexpr uint32_t OF_ONE_SIGN = ((ONE - SMALLEST) >> LOW_BITS) + 1;
  static constexpr uint32_t COUNT = SIGNED ? 2 * OF_ONE_SIGN : OF_ONE_SIGN;
};

struct QuantizedMoments {
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;
  DynamicMap signed_map, unsigned_map;
};

}  // namespace minift
