// AdamW on the elements of a flat shard: each is read once, updated in fp32 and written once.

static inline __attribute__((always_inline)) F32 square_root(F32 v) {
#if LANES == 16
  return _mm512_sqrt_ps(v);
#elif LANES == 8
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The moments become those of this step; returns the new weights.
static inline __attribute__((always_inline)) F32 adamw_lanes(const AdamwStep& step, F32 weight, F32 grad, F32& exp_avg,
                                                             F32& exp_avg_sq) {
  grad *= step.grad_factor;
  exp_avg = step.beta1 * exp_avg + step.one_minus_beta1 * grad;
  exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * grad * grad;
  return step.keep * weight - step.step_size * (exp_avg / (square_root(exp_avg_sq) + step.eps));
}

// ---- new weights to memory: fp32 as they are, bf16 rounded stochastically (minift/ops/rounding.py) ----

#include "random_bits.h"

static inline __attribute__((always_inline)) void store_weights(float* to, F32 weight, uint64_t, int64_t) {
  store(to, weight);
}

static inline __attribute__((always_inline)) void store_weights(Bf16* to, F32 weight, uint64_t key, int64_t element) {
  // Away from zero, if the random bits carry out of the half that is cut off.
  U16 rounded = narrow((bit_cast<U32>(weight) + widen(random_bits(key, element))) >> 16);
  U16 nan = U16{} + uint16_t(0x7fc0);
  U16 is_finite = narrow(bit_cast<U32>(weight * 0.0f == 0.0f) & 0xffffu);
  rounded = (rounded & is_finite) | (nan & ~is_finite);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

// Elements [begin, end). `step.first` is the number of element 0.
template <class T>
void adamw(const AdamwStep& step, T* master, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t begin,
           int64_t end) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) {
    F32 m = load(exp_avg + i), v = load(exp_avg_sq + i);
    F32 weight = adamw_lanes(step, load(master + i), load(grad + i), m, v);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store_weights(master + i, weight, step.key, step.first + i);
  }
  if (int64_t left = end - i; left > 0) {
    F32 m = load(exp_avg + i, left), v = load(exp_avg_sq + i, left);
    F32 weight = adamw_lanes(step, load(master + i, left), load(grad + i, left), m, v);
    store(exp_avg + i, m, left);
    store(exp_avg_sq + i, v, left);
    T last[LANES];
    store_weights(last, weight, step.key, step.first + i);
    __builtin_memcpy(master + i, last, left * sizeof(T));
  }
}
