// AdamW on the elements of a flat shard: each is read once, updated in fp32 and written once.

#define INLINE static inline __attribute__((always_inline))

INLINE F32 square_root(F32 v) {
#if LANES == 16
  return _mm512_sqrt_ps(v);
#elif LANES == 8
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// ---- LANES weights from memory, and to it: fp32, bf16 rounded stochastically, or in halves ----

#include "random_bits.h"

INLINE F32 load_weights(Weights<float> weights, int64_t i) { return load(weights.master + i); }

INLINE F32 load_weights(Weights<Bf16> weights, int64_t i) { return load(weights.master + i); }

// minift/ops/halves.py; the lower half has a sign.
INLINE F32 load_weights(Weights<Bf16, true> weights, int64_t i) {
  U16 lower;
  __builtin_memcpy(&lower, weights.lower + i, sizeof lower);
  U32 upper = bit_cast<U32>(load(weights.master + i));
  return bit_cast<F32>(upper + ((widen(lower) ^ 0x8000u) - 0x8000u));
}

INLINE void store_weights(const AdamwStep&, Weights<float> weights, int64_t i, F32 weight) {
  store(weights.master + i, weight);
}

// minift/ops/rounding.py.
INLINE void store_weights(const AdamwStep& step, Weights<Bf16> weights, int64_t i, F32 weight) {
  // Away from zero, if the random bits carry out of the half that is cut off.
  U16 rounded = narrow((bit_cast<U32>(weight) + widen(random_bits(step.key, step.first + i))) >> 16);
  U16 nan = U16{} + uint16_t(0x7fc0);
  U16 kept = narrow(bit_cast<U32>(weight * 0.0f == 0.0f) & 0xffffu);
  rounded = (rounded & kept) | (nan & ~kept);
  __builtin_memcpy(weights.master + i, &rounded, sizeof rounded);
}

INLINE void store_weights(const AdamwStep&, Weights<Bf16, true> weights, int64_t i, F32 weight) {
  U32 bits = weight == weight ? bit_cast<U32>(weight) : U32{} + 0x7fc00000u;  // a NaN must not be carried around to 0
  U16 upper = narrow((bits + 0x8000u) >> 16), lower = narrow(bits & 0xffffu);
  __builtin_memcpy(weights.master + i, &upper, sizeof upper);
  __builtin_memcpy(weights.lower + i, &lower, sizeof lower);
}

// ---- the update ----

// LANES weights from i on, and their moments, which become those of this step.
template <class T, bool IN_HALVES>
INLINE void update_lanes(const AdamwStep& step, float factor, Weights<T, IN_HALVES> weights, int64_t i, F32& exp_avg,
                         F32& exp_avg_sq) {
  F32 grad = factor * load(weights.grad + i);
  exp_avg = step.beta1 * exp_avg + step.one_minus_beta1 * grad;
  exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * grad * grad;
  F32 old = load_weights(weights, i);
  F32 weight = step.keep * old - step.step_size * (exp_avg / (square_root(exp_avg_sq) + step.eps));
  store_weights(step, weights, i, weight);
}

// The same of `count` <= LANES.
template <class T, bool IN_HALVES>
INLINE void adamw_lanes(const AdamwStep& step, float factor, Weights<T, IN_HALVES> weights, int64_t i, int64_t count,
                        F32& exp_avg, F32& exp_avg_sq) {
  if (count == LANES) return update_lanes(step, factor, weights, i, exp_avg, exp_avg_sq);
  T master[LANES] = {};
  float grad[LANES] = {};
  uint16_t lower[LANES] = {};
  __builtin_memcpy(master, weights.master + i, count * sizeof(T));
  __builtin_memcpy(grad, weights.grad + i, count * sizeof(float));
  if (IN_HALVES) __builtin_memcpy(lower, weights.lower + i, count * sizeof(uint16_t));
  AdamwStep from_here = step;
  from_here.first += i;
  update_lanes(from_here, factor, Weights<T, IN_HALVES>{master, grad, lower}, 0, exp_avg, exp_avg_sq);
  __builtin_memcpy(weights.master + i, master, count * sizeof(T));
  if (IN_HALVES) __builtin_memcpy(weights.lower + i, lower, count * sizeof(uint16_t));
}

// Elements [begin, end); W is a Weights. `step.first` is the number of element 0.
template <class W>
void adamw(const AdamwStep& step, W weights, float* exp_avg, float* exp_avg_sq, int64_t begin, int64_t end) {
  float factor = step.factor();
  if (!is_finite(factor)) return;
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) {
    F32 m = load(exp_avg + i), v = load(exp_avg_sq + i);
    adamw_lanes(step, factor, weights, i, LANES, m, v);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
  if (int64_t left = end - i; left > 0) {
    F32 m = load(exp_avg + i, left), v = load(exp_avg_sq + i, left);
    adamw_lanes(step, factor, weights, i, left, m, v);
    store(exp_avg + i, m, left);
    store(exp_avg_sq + i, v, left);
  }
}

#undef INLINE
