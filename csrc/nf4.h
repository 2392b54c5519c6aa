// NF4, defined once: the codebook, where one code ends and the next begins, which nibble comes first, block sizes.
//
// A tensor of n elements is flattened and cut into blocks (rows do not matter). A block keeps its largest magnitude,
// the scale, in fp32; each element, divided by the scale, becomes the code of the nearest codebook value, 4 bits. Byte
// i holds elements 2i (high nibble) and 2i + 1 (low nibble); an odd n is filled up with a zero. Double quantisation
// keeps the scales as bytes: a scale is map[byte] * (fp32 of its group of NESTED_BLOCK_SIZE scales) + offset.
//
// Paper: Dettmers et al. 2023, arXiv 2305.14314, appendix E. The format is that of bitsandbytes, to the byte.
// minift/ops/nf4.py repeats the numbers for Python, and a test compares the two.

#pragma once

#include "host_device.h"

#include <cstdint>

namespace minift::nf4 {

constexpr int64_t BLOCK_SIZE = 64, NESTED_BLOCK_SIZE = 256;                     // the defaults of bitsandbytes
constexpr int64_t SMALLEST_BLOCK_SIZE = 32, LARGEST_BLOCK_SIZE = 4096;          // and powers of two between

// Quantiles of the normal distribution, rescaled to [-1, 1], with an exact zero.
constexpr float CODEBOOK[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Code i ends here, inclusive: a tie goes to the lower code.
constexpr float threshold(int code) {
  return (CODEBOOK[code] + CODEBOOK[code + 1]) / 2;
}

constexpr float THRESHOLDS[15] = {
    threshold(0), threshold(1), threshold(2),  threshold(3),  threshold(4),  threshold(5),  threshold(6), threshold(7),
    threshold(8), threshold(9), threshold(10), threshold(11), threshold(12), threshold(13), threshold(14),
};

// Blocks of smaller numbers are divided by this instead of their largest magnitude, whose reciprocal would overflow.
constexpr float SMALLEST_DIVISOR = 1e-38f;

// The number of thresholds below `normalised`, by bisection. `thresholds` is THRESHOLDS, or a copy of it that is near.
template <class Thresholds>
MINIFT_HOST_DEVICE uint32_t code_of(float normalised, const Thresholds& thresholds) {
  uint32_t code = normalised > thresholds[7] ? 8 : 0;
  code += normalised > thresholds[code + 3] ? 4 : 0;
  code += normalised > thresholds[code + 1] ? 2 : 0;
  code += normalised > thresholds[code] ? 1 : 0;
  return code;
}

MINIFT_HOST_DEVICE constexpr uint8_t pack(uint32_t even_code, uint32_t odd_code) {
  return static_cast<uint8_t>(even_code << 4 | odd_code);
}
MINIFT_HOST_DEVICE constexpr uint32_t even_code(uint8_t byte) { return byte >> 4; }
MINIFT_HOST_DEVICE constexpr uint32_t odd_code(uint8_t byte) { return byte & 15; }

// The scales of a weight as kernels read them: fp32, or bytes that are expanded one at a time.
struct Scales {
  const float* absmax;          // fp32 per block; null when double-quantised, and then:
  const uint8_t* bytes;         // per block
  const float* nested_absmax;   // per NESTED_BLOCK_SIZE blocks
  const float* map;             // what a byte stands for, 256 numbers
  const float* offset;          // one number

  // What the scale of a block is made of. Between the two steps a kernel has time for something else.
  struct Entry {
    float number;  // the scale, or that of the group
    uint8_t byte;
  };
  MINIFT_HOST_DEVICE Entry entry(int64_t block) const {
    if (absmax != nullptr) return {absmax[block], 0};
    return {nested_absmax[block / NESTED_BLOCK_SIZE], bytes[block]};
  }
  MINIFT_HOST_DEVICE float scale(Entry entry) const {
    if (absmax != nullptr) return entry.number;
    float product = map[entry.byte] * entry.number;
    // Rounded before the addition, as bitsandbytes does it, and not fused with it.
#if defined(__CUDA_ARCH__)
    return __fadd_rn(product, *offset);
#else
    __asm__("" : "+m"(product));
    return product + *offset;
#endif
  }

  MINIFT_HOST_DEVICE float operator[](int64_t block) const { return scale(entry(block)); }

  MINIFT_HOST_DEVICE void copy(int64_t first, int64_t count, float* to) const {
    if (absmax != nullptr) {
      __builtin_memcpy(to, absmax + first, count * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = (*this)[first + i];
    }
  }
};

}  // namespace minift::nf4
