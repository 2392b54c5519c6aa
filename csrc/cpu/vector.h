// Vectors of LANES fp32 elements: loads and stores that convert from and to fp32, bf16 and fp16, and exp.
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

template <class To, class From>
INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

INLINE F32 splat(float value) { return F32{} + value; }

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
INLINE U16 from_fp32(F32 v, Bf16*) {
#if HAS_BF16
  return bit_cast<U16>(_mm512_cvtneps_pbh(v));  // differs from torch in one thing: subnormals become zero
#else
  U32 bits = bit_cast<U32>(v);
  U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(v == v ? rounded : U32{} + 0x7fc0u);  // a NaN must not round up to infinity
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

// ---- exp ----

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

#undef INLINE
