// Random bits that are a function of (key, element): SplitMix64, as minift/ops/rounding.py has it. For kernel files.

// Four elements share one 64-bit output of SplitMix64, the first its lowest bits.
typedef uint64_t U64 __attribute__((vector_size(LANES * 2)));

// Outputs number `word`, word + 1, ... of the generator with seed `key`, 16 bits for each of LANES elements.
static inline __attribute__((always_inline)) U16 random_words(uint64_t key, int64_t word) {
  constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15;
  U64 words = {};
  for (int i = 0; i < LANES / 4; ++i) words[i] = i;
  words = (words + uint64_t(word + 1)) * GAMMA + key;
  words = (words ^ (words >> 30)) * uint64_t(0xBF58476D1CE4E5B9);
  words = (words ^ (words >> 27)) * uint64_t(0x94D049BB133111EB);
  return bit_cast<U16>(words ^ (words >> 31));
}

// 16 random bits for elements `element` to element + LANES - 1.
static inline __attribute__((always_inline)) U16 random_bits(uint64_t key, int64_t element) {
  U16 words = random_words(key, element / 4);
  if (element % 4 == 0) return words;
  uint16_t lanes[2 * LANES];
  U16 more = random_words(key, element / 4 + LANES / 4), shifted;
  __builtin_memcpy(lanes, &words, sizeof words);
  __builtin_memcpy(lanes + LANES, &more, sizeof more);
  __builtin_memcpy(&shifted, lanes + element % 4, sizeof shifted);
  return shifted;
}
