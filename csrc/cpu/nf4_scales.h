// The scales of NF4 blocks as the CPU kernels read them: fp32, or bytes that are expanded one at a time.

#pragma once

#include "../nf4.h"

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
};

}  // namespace minift
