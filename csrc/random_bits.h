// Random bits that are a function of (key, element): SplitMix64, as minift/ops/rounding.py has it; for CPU and CUDA.

#pragma once

#include "host_device.h"

#include <cstdint>

namespace minift {

struct SplitMix64 {
  static constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15, MIX_1 = 0xBF58476D1CE4E5B9, MIX_2 = 0x94D049BB133111EB;
};

// Output number `word`, counted from 0, of the generator with seed `key`: four elements' bits, the first its lowest.
MINIFT_HOST_DEVICE uint64_t random_word(uint64_t key, int64_t word) {
  uint64_t bits = static_cast<uint64_t>(word + 1) * SplitMix64::GAMMA + key;
  bits = (bits ^ (bits >> 30)) * SplitMix64::MIX_1;
  bits = (bits ^ (bits >> 27)) * SplitMix64::MIX_2;
  return bits ^ (bits >> 31);
}

// 16 random bits for each of the elements `element` to element + 3, the first the lowest. Of calls for neighbours in
// one thread the compiler computes every word once.
MINIFT_HOST_DEVICE uint64_t random_bits_of_four(uint64_t key, int64_t element) {
  int64_t word = element / 4;
  int shift = static_cast<int>(element % 4) * 16;
  uint64_t bits = random_word(key, word);
  return shift == 0 ? bits : bits >> shift | random_word(key, word + 1) << (64 - shift);
}

}  // namespace minift
