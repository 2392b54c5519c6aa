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

// ---- the update ----

// The first `count` <= LANES elements; the other lanes are zero.
template <class T>
static inline __attribute__((always_inline)) F32 load_up_to(const T* from, int64_t count) {
  return count == LANES ? load(from) : load(from, count);
}

// `count` <= LANES weights from i on, and their moments, which become those of this step.
template <class T, class Wire>
static inline __attribute__((always_inline)) void adamw_lanes(const AdamwStep& step, float factor,
                                                              Weights<T, Wire> weights, int64_t i, int64_t count,
                                                              F32& exp_avg, F32& exp_avg_sq) {
  F32 grad = factor * load_up_to(weights.grad + i, count);
  exp_avg = step.beta1 * exp_avg + step.one_minus_beta1 * grad;
  exp_avg_sq = step.beta2 * exp_avg_sq + step.one_minus_beta2 * grad * grad;
  F32 old = load_up_to(weights.master + i, count);
  F32 weight = step.keep * old - step.step_size * (exp_avg / (square_root(exp_avg_sq) + step.eps));
  if (count == LANES) {
    store_weights(weights.master + i, weight, step.key, step.first + i);
    if (weights.wire != nullptr) store_exactly(weights.wire + i, load(weights.master + i));
  } else {
    T last[LANES];
    store_weights(last, weight, step.key, step.first + i);
    __builtin_memcpy(weights.master + i, last, count * sizeof(T));
    if (weights.wire == nullptr) return;
    Wire last_wire[LANES];
    store_exactly(last_wire, load(last));
    __builtin_memcpy(weights.wire + i, last_wire, count * sizeof(Wire));
  }
}

// Elements [begin, end); W is a Weights<T, Wire>. `step.first` is the number of element 0.
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
