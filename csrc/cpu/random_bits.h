// The random bits of ../random_bits.h for LANES elements at a time. For kernel files.

// Four elements share one 64-bit output of SplitMix64, the first its lowest bits.
typedef uint64_t U64 __attribute__((vector_size(LANES * 2)));

// Outputs number `word`, word + 1, ... of the generator with seed `key`, 16 bits for each of LANES elements.
static inline __attribute__((always_inline)) U16 random_words(uint64_t key, int64_t word) {
  U64 words = {};
  for (int i = 0; i < LANES / 4; ++i) words[i] = i;
  words = (words + uint64_t(word + 1)) * SplitMix64::GAMMA + key;
  words = (words ^ (words >> 30)) * SplitMix64::MIX_1;
  words = (words ^ (words >> 27)) * SplitMix64::MIX_2;
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
