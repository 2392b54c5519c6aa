// Blocks of 256 elements as 8-bit codes and one absmax: minift/ops/blockwise.py says what and why.

static inline __attribute__((always_inline)) U32 gather(const uint32_t* table, U32 index) {
#if LANES == 16
  return bit_cast<U32>(_mm512_i32gather_epi32(bit_cast<__m512i>(index), table, 4));
#elif LANES == 8
  return bit_cast<U32>(_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), bit_cast<__m256i>(index), 4));
#else
  U32 found;
  for (int i = 0; i < LANES; ++i) found[i] = table[index[i]];
  return found;
#endif
}

// One of 256 values for each lane. A gather is a load per lane; with AVX-512 eight permutations of 32 are faster.
static inline __attribute__((always_inline)) F32 value_of(const uint32_t* values, U32 code) {
#if LANES == 16
  __m512i index = bit_cast<__m512i>(code);
  __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
  __m512 of[8];
  for (int i = 0; i < 8; ++i) {
    of[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(values + 32 * i), index, _mm512_loadu_ps(values + 32 * i + 16));
  }
  for (int i = 0; i < 8; i += 2) of[i] = _mm512_mask_mov_ps(of[i], bit5, of[i + 1]);
  for (int i = 0; i < 8; i += 4) of[i] = _mm512_mask_mov_ps(of[i], bit6, of[i + 2]);
  return _mm512_mask_mov_ps(of[0], bit7, of[4]);
#else
  return bit_cast<F32>(gather(values, code));
#endif
}

static inline __attribute__((always_inline)) F32 dequantize(const uint8_t* codes, float absmax, DynamicMap map) {
  return absmax * value_of(map.values, load_bytes(codes));
}

// Codes of LANES values between -1 or 0 and 1.
template <bool SIGNED>
static inline __attribute__((always_inline)) U32 quantize(F32 normed, DynamicMap map) {
  using Map = Buckets<SIGNED>;
  U32 bits = bit_cast<U32>(normed) & 0x7fffffffu;
  bits = bits > Map::SMALLEST ? bits : U32{} + Map::SMALLEST;
  bits = bits < Map::ONE ? bits : U32{} + Map::ONE;  // a NaN must not look beyond the table
  U32 negative = SIGNED ? bit_cast<U32>(bit_cast<I32>(normed) >> 31) : U32{};
  U32 entry = gather(map.buckets, ((bits - Map::SMALLEST) >> Map::LOW_BITS) + (negative & Map::OF_ONE_SIGN));
  U32 beyond = bit_cast<U32>((bits & ((1u << Map::LOW_BITS) - 1)) > (entry & ((1u << Map::CODE_SHIFT) - 1)));
  // That is 0 or -1: one further away from zero, up, or below zero down.
  U32 code = (entry >> Map::CODE_SHIFT) - ((beyond ^ negative) - negative);
  if (!SIGNED) code &= bit_cast<U32>(normed > 0.0f);
  return code;
}

// The first `count` codes of a block, and its absmax, from all of its BLOCK values, zero from `count` on.
template <bool SIGNED>
static inline __attribute__((always_inline)) float quantize_block(const float* values, int64_t count, DynamicMap map,
                                                                  uint8_t* codes) {
  F32 largest[2] = {};
  for (int64_t i = 0; i < BLOCK; i += 2 * LANES) {
    for (int k = 0; k < 2; ++k) {
      F32 v = load(values + i + k * LANES);
      largest[k] = at_least(largest[k], bit_cast<F32>(bit_cast<U32>(v) & 0x7fffffffu));
    }
  }
  float maxima[LANES], absmax = 0.0f;
  store(maxima, at_least(largest[0], largest[1]));
  for (int i = 0; i < LANES; ++i) absmax = maxima[i] > absmax ? maxima[i] : absmax;
  float inverse = absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f;  // that of a subnormal number may be infinite
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_bytes(codes + i, quantize<SIGNED>(load(values + i) * inverse, map));
  if (i < count) {
    uint8_t last[LANES];
    store_bytes(last, quantize<SIGNED>(load(values + i) * inverse, map));
    __builtin_memcpy(codes + i, last, count - i);
  }
  return absmax;
}
