// The update of four weights by a thread, for the kernels with fp32 and with 8-bit moments. Every operation is named
// and rounds as IEEE says, so that a weight has the same bits wherever in a tensor it is and whatever it is stored as.

#pragma once

#include "../adamw.h"
#include "../random_bits.h"
#include "elements.h"

#include <type_traits>

namespace minift::cuda {

// An fp32 weight as T can represent it; to bf16, stochastically by 16 random bits (minift/ops/rounding.py).
template <class T>
__device__ inline float rounded_weight(float weight, uint32_t random_bits) {
  if (!std::is_same<T, Bf16>::value) return weight;
  // Away from zero, if the random bits carry out of the half that is cut off.
  float rounded = __uint_as_float((__float_as_uint(weight) + random_bits) & 0xffff0000u);
  bool is_finite = (__float_as_uint(weight) & 0x7fffffffu) < 0x7f800000u;
  return is_finite ? rounded : __uint_as_float(0x7fc00000u);
}

// The first `count` of the weights from i on; and their moments, which become those of this step. VECTOR: all of them
// are there, and aligned.
template <bool VECTOR, class T, class Wire>
__device__ __forceinline__ void update_quad(const AdamwStep& step, float factor, const Weights<T, Wire>& weights,
                                            int64_t i, int64_t count, Quad& exp_avg, Quad& exp_avg_sq) {
  if (VECTOR) count = QUAD;
  Quad grad = to_floats(load_elements<VECTOR, QUAD>(weights.grad + i, count));
  Quad master = to_floats(load_elements<VECTOR, QUAD>(weights.master + i, count));
  uint64_t random_bits = std::is_same<T, Bf16>::value ? random_bits_of_four(step.key, step.first + i) : 0;
#pragma unroll
  for (int k = 0; k < QUAD; ++k) {
    float g = __fmul_rn(factor, grad.at[k]);
    float m = __fmaf_rn(step.beta1, exp_avg.at[k], __fmul_rn(step.one_minus_beta1, g));
    float v = __fmaf_rn(step.beta2, exp_avg_sq.at[k], __fmul_rn(__fmul_rn(step.one_minus_beta2, g), g));
    float quotient = __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), step.eps));
    float weight = __fmaf_rn(step.keep, master.at[k], -__fmul_rn(step.step_size, quotient));
    exp_avg.at[k] = m;
    exp_avg_sq.at[k] = v;
    master.at[k] = rounded_weight<T>(weight, static_cast<uint32_t>(random_bits >> (16 * k)) & 0xffffu);
  }
  store_pack<VECTOR>(weights.master + i, master, count);
  if (weights.wire != nullptr) store_pack<VECTOR>(weights.wire + i, master, count);
}

template <class T, class Wire>
__host__ inline bool aligned(const Weights<T, Wire>& weights) {
  return aligned<QUAD>(weights.master) && aligned<QUAD>(weights.grad) && aligned<QUAD>(weights.wire);
}

}  // namespace minift::cuda
