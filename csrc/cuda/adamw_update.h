// The update of four weights by a thread, for the kernels with fp32 and with 8-bit moments. Every operation is named
// and rounds as IEEE says, so that a weight has the same bits wherever in a tensor it is and whatever it is stored as.

#pragma once

#include "../adamw.h"
#include "../random_bits.h"
#include "elements.h"

#include <type_traits>

namespace minift::cuda {

// An fp32 weight as bf16 can represent it, stochastically by 16 random bits (minift/ops/rounding.py).
__device__ inline float rounded_weight(float weight, uint32_t random_bits) {
  // Away from zero, if the random bits carry out of the half that is cut off.
  float rounded = __uint_as_float((__float_as_uint(weight) + random_bits) & 0xffff0000u);
  bool is_finite = (__float_as_uint(weight) & 0x7fffffffu) < 0x7f800000u;
  return is_finite ? rounded : __uint_as_float(0x7fc00000u);
}

// fp32 from its halves, of which the lower one has a sign; and back (minift/ops/halves.py).
__device__ inline float join(Bf16 upper, uint16_t lower) {
  uint32_t sign = lower & 0x8000u;
  return __uint_as_float((uint32_t{upper.bits} << 16) + lower - (sign << 1));
}

__device__ inline Bf16 upper_half(float weight) {
  uint32_t bits = weight == weight ? __float_as_uint(weight) : 0x7fc00000u;  // a NaN must not be carried around to 0
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16)};
}

__device__ inline uint16_t lower_half(float weight) {
  return weight == weight ? static_cast<uint16_t>(__float_as_uint(weight)) : 0;
}

// The first `count` of the weights from i on, in fp32.
template <bool VECTOR, class T, bool IN_HALVES>
__device__ __forceinline__ Quad load_weights(const Weights<T, IN_HALVES>& weights, int64_t i, int64_t count) {
  PackOf<T, QUAD> master = load_elements<VECTOR, QUAD>(weights.master + i, count);
  if constexpr (IN_HALVES) {
    PackOf<uint16_t, QUAD> lower = load_elements<VECTOR, QUAD>(weights.lower + i, count);
    Quad joined;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) joined.at[k] = join(master.at(k), lower.at(k));
    return joined;
  } else {
    return to_floats(master);
  }
}

// To where they were loaded from; in bf16 alone, they are representable.
template <bool VECTOR, class T, bool IN_HALVES>
__device__ __forceinline__ void store_weights(const Weights<T, IN_HALVES>& weights, const Quad& values, int64_t i,
                                              int64_t count) {
  if constexpr (IN_HALVES) {
    PackOf<Bf16, QUAD> upper{};
    PackOf<uint16_t, QUAD> lower{};
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
      upper.set(k, upper_half(values.at[k]));
      lower.set(k, lower_half(values.at[k]));
    }
    store_elements<VECTOR>(weights.master + i, upper, count);
    store_elements<VECTOR>(weights.lower + i, lower, count);
  } else {
    store_pack<VECTOR>(weights.master + i, values, count);
  }
}

// The first `count` of the weights from i on; and their moments, which become those of this step. VECTOR: all of them
// are there, and aligned.
template <bool VECTOR, class T, bool IN_HALVES>
__device__ __forceinline__ void update_quad(const AdamwStep& step, float factor,
                                            const Weights<T, IN_HALVES>& weights, int64_t i, int64_t count,
                                            Quad& exp_avg, Quad& exp_avg_sq) {
  constexpr bool IS_ROUNDED = std::is_same<T, Bf16>::value && !IN_HALVES;
  if (VECTOR) count = QUAD;
  Quad grad = to_floats(load_elements<VECTOR, QUAD>(weights.grad + i, count));
  Quad master = load_weights<VECTOR>(weights, i, count);
  uint64_t random_bits = IS_ROUNDED ? random_bits_of_four(step.key, step.first + i) : 0;
#pragma unroll
  for (int k = 0; k < QUAD; ++k) {
    float g = __fmul_rn(factor, grad.at[k]);
    float m = __fmaf_rn(step.beta1, exp_avg.at[k], __fmul_rn(step.one_minus_beta1, g));
    float v = __fmaf_rn(step.beta2, exp_avg_sq.at[k], __fmul_rn(__fmul_rn(step.one_minus_beta2, g), g));
    float quotient = __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), step.eps));
    float weight = __fmaf_rn(step.keep, master.at[k], -__fmul_rn(step.step_size, quotient));
    exp_avg.at[k] = m;
    exp_avg_sq.at[k] = v;
    uint32_t bits = static_cast<uint32_t>(random_bits >> (16 * k)) & 0xffffu;
    master.at[k] = IS_ROUNDED ? rounded_weight(weight, bits) : weight;
  }
  store_weights<VECTOR>(weights, master, i, count);
}

template <class T, bool IN_HALVES>
__host__ inline bool aligned(const Weights<T, IN_HALVES>& weights) {
  return aligned<QUAD>(weights.master) && aligned<QUAD>(weights.grad) && aligned<QUAD>(weights.lower);
}

}  // namespace minift::cuda
