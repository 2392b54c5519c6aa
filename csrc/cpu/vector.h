// Vectors of LANES fp32 elements: loads and stores that convert from and to fp32, bf16 and fp16, transposition, tables
// of 16 entries, and exp.
//
// Included once per instruction set by for_each_instruction_set.h (no include guard, no includes). Arithmetic on F32
// is the compiler's: + - * /, comparisons that give I32 masks (-1 or 0), and mask ? a : b. Where an instruction set
// has one instruction for what takes several of these, it is used by name: LANES is 16 with AVX-512, 8 with AVX2, and
// HAS_BF16 is 1 where AVX-512 rounds to bf16.

#define INLINE static inline __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(LANES * 4)));
typedef int32_t I32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t U32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));
typedef uint8_t U8 __attribute__((vector_size(LANES)));

template <class To, class From>
INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

INLINE F32 splat(float value) { return value - F32{}; }  // minus, because 0 + -0 is not -0

INLINE float sum(F32 v) {
  float lanes[LANES];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The limit is not applied to a NaN.
INLINE F32 at_most(F32 v, F32 limit) {
#if LANES == 16
  return _mm512_min_ps(limit, v);
#elif LANES == 8
  return _mm256_min_ps(limit, v);
#else
  return v > limit ? limit : v;
#endif
}

INLINE F32 at_least(F32 v, F32 limit) {
#if LANES == 16
  return _mm512_max_ps(limit, v);
#elif LANES == 8
  return _mm256_max_ps(limit, v);
#else
  return v < limit ? limit : v;
#endif
}

INLINE U32 widen(U16 v) {
#if LANES == 16
  return bit_cast<U32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(v)));
#elif LANES == 8
  return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

// Every element must fit.
INLINE U16 narrow(U32 v) {
#if LANES == 16
  return bit_cast<U16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif LANES == 8
  __m256i in_halves = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
  return bit_cast<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(in_halves, 0b1000)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// ---- fp32 to a storage type and back; rounding is to nearest even, as torch's ----

INLINE F32 to_fp32(F32 v, float*) { return v; }
INLINE F32 from_fp32(F32 v, float*) { return v; }

INLINE F32 to_fp32(U16 bits, Bf16*) { return bit_cast<F32>(widen(bits) << 16); }
INLINE U16 from_fp32_exactly(F32 v, Bf16*) {
  U32 bits = bit_cast<U32>(v);
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(v == v ? rounded : U32{} + 0x7fc0u);  // a NaN must not round up to infinity
}
INLINE U16 from_fp32(F32 v, Bf16*) {
#if HAS_BF16
  return bit_cast<U16>(_mm512_cvtneps_pbh(v));  // differs from torch in one thing: subnormals become zero
#else
  return from_fp32_exactly(v, (Bf16*)nullptr);
#endif
}

INLINE F32 to_fp32(U16 half, Fp16*) {
#if LANES == 16
  return _mm512_cvtph_ps(bit_cast<__m256i>(half));
#elif LANES == 8
  return _mm256_cvtph_ps(bit_cast<__m128i>(half));
#else
  // Shifted into place, the exponent is too small by 127 - 15 = 112; the product also makes subnormals right.
  U32 bits = widen(half);
  F32 magnitude = bit_cast<F32>((bits & 0x7fff) << 13) * 0x1p112f;
  U32 infinite_or_nan = bit_cast<U32>(magnitude >= 0x1p16f) & 0x7f800000u;
  return bit_cast<F32>(bit_cast<U32>(magnitude) | infinite_or_nan | ((bits & 0x8000) << 16));
#endif
}
INLINE U16 from_fp32(F32 v, Fp16*) {
#if LANES == 16
  return bit_cast<U16>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
  return bit_cast<U16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  U32 bits = bit_cast<U32>(v);
  U32 sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffffu;
  U32 normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Below 2^-14: adding 1/2 makes the adder round at 2^-24, the spacing of fp16's subnormals.
  U32 subnormal = bit_cast<U32>(bit_cast<F32>(bits) + 0.5f) - 0x3f000000u;
  U32 finite = bits < 0x38800000u ? subnormal : normal;
  U32 half = bits >= 0x477ff000u ? U32{} + 0x7c00u : finite;  // 65520 and above round to infinity
  half = v == v ? half : U32{} + 0x7e00u;
  return narrow(half | sign);
#endif
}
INLINE U16 from_fp32_exactly(F32 v, Fp16*) { return from_fp32(v, (Fp16*)nullptr); }

// ---- memory ----

template <class T>
struct Storage { using Vector = U16; };
template <>
struct Storage<float> { using Vector = F32; };

template <class T>
INLINE F32 load(const T* from) {
  typename Storage<T>::Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return to_fp32(v, (T*)nullptr);
}

// The first `count` < LANES elements; the other lanes are zero.
template <class T>
INLINE F32 load(const T* from, int64_t count) {
  T lanes[LANES] = {};
  __builtin_memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
INLINE void store(T* to, F32 value) {
  typename Storage<T>::Vector v = from_fp32(value, (T*)nullptr);
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
INLINE void store(T* to, F32 value, int64_t count) {
  T lanes[LANES];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

// What is left of a value after a visit to T.
template <class T>
INLINE F32 round_to(F32 value) {
  return to_fp32(from_fp32(value, (T*)nullptr), (T*)nullptr);
}

// ---- pairs of neighbours, and bytes ----

// Of 2 * LANES elements in memory, those with an even index and those with an odd one.
struct Pairs { F32 even, odd; };

template <class T>
INLINE Pairs load_pairs(const T* from) {
  F32 first = load(from), second = load(from + LANES);
#if LANES == 16
  return {__builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#elif LANES == 8
  return {__builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15)};
#else
  return {__builtin_shufflevector(first, second, 0, 2, 4, 6), __builtin_shufflevector(first, second, 1, 3, 5, 7)};
#endif
}

// 4 * LANES bytes.
INLINE U32 load_bits(const void* from) {
  typedef uint32_t Unaligned __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
  return *(const Unaligned*)from;
}

// Two bf16 in 32 bits are one fp32 and another with some bits too many.
INLINE Pairs load_pairs(const Bf16* from) {
  U32 bits = load_bits(from);
  return {bit_cast<F32>(bits << 16), bit_cast<F32>(bits & 0xffff0000u)};
}

// Even and odd elements in turns: the first LANES of them and the rest.
struct Halves { F32 first, second; };

INLINE Halves interleave(F32 even, F32 odd) {
#if LANES == 16
  return {__builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#elif LANES == 8
  return {__builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11),
          __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15)};
#else
  return {__builtin_shufflevector(even, odd, 0, 4, 1, 5), __builtin_shufflevector(even, odd, 2, 6, 3, 7)};
#endif
}

INLINE void store_pairs(float* to, Pairs pairs) {
  Halves halves = interleave(pairs.even, pairs.odd);
  store(to, halves.first);
  store(to + LANES, halves.second);
}

// rows[i][j] to rows[j][i]. Interleaving row i with row i + LANES / 2 moves the highest bit of the row's index below
// the column's bits; after as many rounds as there are bits, row and column have changed places.
INLINE void transpose(F32 (&rows)[LANES]) {
  for (int round = 1; round < LANES; round *= 2) {
    F32 next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      Halves halves = interleave(rows[i], rows[i + LANES / 2]);
      next[2 * i] = halves.first;
      next[2 * i + 1] = halves.second;
    }
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
}

INLINE U32 load_bytes(const uint8_t* from) {
  U8 bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
#if LANES == 16
  return bit_cast<U32>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bytes)));
#elif LANES == 8
  return bit_cast<U32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(bytes))));
#else
  return __builtin_convertvector(bytes, U32);
#endif
}

// Every element must fit into a byte.
INLINE void store_bytes(uint8_t* to, U32 v) {
#if LANES == 16
  U8 bytes = bit_cast<U8>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(v)));
#elif LANES == 8
  __m128i words = bit_cast<__m128i>(narrow(v));
  U8 bytes = bit_cast<U8>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  U8 bytes = __builtin_convertvector(v, U8);
#endif
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

// ---- tables of 16 entries, indexed by the low 4 bits of each element ----

struct Table { F32 parts[16 / LANES]; };

INLINE Table load_table(const float* from) {
  Table table;
  __builtin_memcpy(&table, from, sizeof table);
  return table;
}

INLINE Table operator*(Table table, float factor) {
  for (F32& part : table.parts) part *= factor;
  return table;
}

INLINE F32 lookup(const Table& table, U32 index) {
#if LANES == 16
  return _mm512_permutexvar_ps(bit_cast<__m512i>(index), table.parts[0]);
#elif LANES == 8
  __m256i lanes = bit_cast<__m256i>(index);
  F32 low = _mm256_permutevar8x32_ps(table.parts[0], lanes), high = _mm256_permutevar8x32_ps(table.parts[1], lanes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
#else
  float entries[16];
  __builtin_memcpy(entries, &table, sizeof entries);
  F32 found;
  for (int i = 0; i < LANES; ++i) found[i] = entries[index[i] & 15];
  return found;
#endif
}

// A table of 16-bit entries that answers two indices per 32-bit element, its low and its high half.
struct HalfTable {
#if LANES == 16
  __m512i entries;  // twice: the instruction looks at 5 bits of the index
#elif LANES == 8
  __m256i low_bytes, high_bytes;  // each twice: the instruction works within 128 bits
#else
  uint16_t entries[16];
#endif
};

template <class T>
INLINE HalfTable half_table(const Table& table, T*) {
#if LANES == 16
  return {_mm512_broadcast_i64x4(bit_cast<__m256i>(from_fp32_exactly(table.parts[0], (T*)nullptr)))};
#elif LANES == 8
  __m128i first = bit_cast<__m128i>(from_fp32_exactly(table.parts[0], (T*)nullptr));
  __m128i second = bit_cast<__m128i>(from_fp32_exactly(table.parts[1], (T*)nullptr));
  __m128i low = _mm_set1_epi16(0xff);
  return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low))),
          _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)))};
#else
  HalfTable half;
  for (int i = 0; i < 16 / LANES; ++i) {
    U16 part = from_fp32_exactly(table.parts[i], (T*)nullptr);
    __builtin_memcpy(half.entries + i * LANES, &part, sizeof part);
  }
  return half;
#endif
}

INLINE U32 lookup(const HalfTable& table, U32 indices) {
#if LANES == 16
  return bit_cast<U32>(_mm512_permutexvar_epi16(bit_cast<__m512i>(indices), table.entries));
#elif LANES == 8
  __m256i low = bit_cast<__m256i>(indices & 0x000f000fu);
  U32 zero_high_byte = U32{} + 0x80008000u, zero_low_byte = U32{} + 0x00800080u;  // an index of 128 or more gives 0
  __m256i low_index = low | bit_cast<__m256i>(zero_high_byte);
  __m256i high_index = _mm256_slli_epi16(low, 8) | bit_cast<__m256i>(zero_low_byte);
  return bit_cast<U32>(_mm256_shuffle_epi8(table.low_bytes, low_index) |
                       _mm256_shuffle_epi8(table.high_bytes, high_index));
#else
  U32 found;
  for (int i = 0; i < LANES; ++i) {
    found[i] = table.entries[indices[i] & 15] | uint32_t(table.entries[indices[i] >> 16 & 15]) << 16;
  }
  return found;
#endif
}

// Every 32-bit element holds two bf16: sum + a_low * b_low + a_high * b_high.
INLINE F32 add_dot_of_bf16_pairs(F32 sum, U32 a, U32 b) {
#if HAS_BF16
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#else
  sum += bit_cast<F32>(a & 0xffff0000u) * bit_cast<F32>(b & 0xffff0000u);
  return sum + bit_cast<F32>(a << 16) * bit_cast<F32>(b << 16);
#endif
}

// Each lane's two values, rounded to bf16: `low` in the low half of 32 bits.
INLINE U32 bf16_pairs(F32 low, F32 high) {
#if HAS_BF16
  __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));  // all of `low`, then all of `high`
  U32 in_turns;
  for (int i = 0; i < LANES; ++i) in_turns[i] = i | (i + LANES) << 16;
  return bit_cast<U32>(_mm512_permutexvar_epi16(bit_cast<__m512i>(in_turns), halves));
#else
  return widen(from_fp32(low, (Bf16*)nullptr)) | widen(from_fp32(high, (Bf16*)nullptr)) << 16;
#endif
}

// ---- exp and exp2 ----

// v * 2^n for integers n in [-150, 128].
INLINE F32 times_power_of_two(F32 v, F32 n) {
#if LANES == 16
  return _mm512_scalef_ps(v, n);
#else
  // In two factors, as neither 2^128 nor 2^-150 is an fp32. n + 1.5 * 2^23 has the integer in its low bits.
  I32 exponent = bit_cast<I32>(n + 0x1.8p23f) - 0x4b400000, half = exponent >> 1;
  return v * bit_cast<F32>((half + 127) << 23) * bit_cast<F32>((exponent - half + 127) << 23);
#endif
}

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2) / 2. The Taylor polynomial of degree 7 cuts off at
// |r|^8 / 8! = 5e-9, a tenth of an fp32 rounding, so the error is the arithmetic's: below 1 ulp with fused
// multiply-adds, below 2 without. ln 2 is subtracted in two parts, the first short enough for n * LN2_HIGH to be exact.
// Overflow gives infinity, underflow subnormals and zero.
INLINE F32 exp(F32 x) {
  constexpr float INVERSE_LN2 = 0x1.715476p+0f, LN2_HIGH = 0x1.63p-1f, LN2_LOW = -0x1.bd0106p-13f;
  constexpr float ROUNDER = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  x = at_least(at_most(x, splat(89.0f)), splat(-104.0f));  // e^89 is infinite and e^-104 zero in fp32
  F32 n = (x * INVERSE_LN2 + ROUNDER) - ROUNDER;
  F32 r = x - n * LN2_HIGH - n * LN2_LOW;
  F32 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return times_power_of_two(p, n);
}

// 2^x for x <= 127; below 2^-126 it is zero or subnormal. 2^r for |r| <= 1/2 is the polynomial of degree 6 with the
// smallest relative error of those that are 1 at 0: 2e-9, a thirtieth of an fp32 rounding.
INLINE F32 exp2(F32 x) {
#if LANES == 16
  x = at_least(x, splat(-200.0f));  // 2^-200 is zero in fp32
  F32 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
#else
  constexpr float ROUNDER = 0x1.8p23f;
  F32 clamped = at_least(x, splat(-126.0f)), shifted = clamped + ROUNDER, r = clamped - (shifted - ROUNDER);
#endif
  F32 p = splat(0x1.41fbbcp-13f);
  p = p * r + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
#if LANES == 16
  return _mm512_scalef_ps(p, n);
#else
  F32 power = p * bit_cast<F32>((bit_cast<U32>(shifted) << 23) + 0x3f800000u);  // the low bits of shifted are n's
  return x < -126.0f ? F32{} : power;
#endif
}

#undef INLINE
