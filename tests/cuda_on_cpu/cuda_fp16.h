// fp16 as cuda_runtime.h beside this.

#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline __half __ushort_as_half(uint16_t bits) { return {__builtin_bit_cast(_Float16, bits)}; }
inline uint16_t __half_as_ushort(__half half) { return __builtin_bit_cast(uint16_t, half.value); }
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
