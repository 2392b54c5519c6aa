// AdamW with 8-bit moments: a block is dequantised, updated and quantised again while it is in the L1 cache.

#include "adamw_kernels.h"
#include "blockwise_kernels.h"

// `count` elements from `i` on, count <= LANES; the moments go to m and v.
template <class T, bool IN_HALVES>
static inline __attribute__((always_inline)) void adamw_8bit_lanes(const AdamwStep& step, float factor,
                                                                   const QuantizedMoments& moments,
                                                                   Weights<T, IN_HALVES> weights, int64_t i,
                                                                   int64_t count, float* m, float* v) {
  int64_t block = i / BLOCK;
  uint8_t padded[2][LANES] = {};
  const uint8_t *m_codes = moments.exp_avg + i, *v_codes = moments.exp_avg_sq + i;
  if (count < LANES) {
    __builtin_memcpy(padded[0], m_codes, count);
    __builtin_memcpy(padded[1], v_codes, count);
    m_codes = padded[0], v_codes = padded[1];
  }
  F32 exp_avg = dequantize(m_codes, moments.exp_avg_absmax[block], moments.signed_map);
  F32 exp_avg_sq = dequantize(v_codes, moments.exp_avg_sq_absmax[block], moments.unsigned_map);
  adamw_lanes(step, factor, weights, i, count, exp_avg, exp_avg_sq);
  if (count == LANES) {
    store(m, exp_avg);
    store(v, exp_avg_sq);
  } else {
    store(m, exp_avg, count);
    store(v, exp_avg_sq, count);
  }
}

// Blocks [begin, end) of `numel` elements; W is a Weights; the last one may be shorter.
template <class W>
void adamw_8bit(const AdamwStep& step, const QuantizedMoments& moments, W weights, int64_t numel, int64_t begin,
                int64_t end) {
  float factor = step.factor();
  if (!is_finite(factor)) return;
  for (int64_t block = begin; block < end; ++block) {
    int64_t start = block * BLOCK, count = numel - start < BLOCK ? numel - start : BLOCK, i = 0;
    float m[BLOCK], v[BLOCK];
    for (; i + LANES <= count; i += LANES) {
      adamw_8bit_lanes(step, factor, moments, weights, start + i, LANES, m + i, v + i);
    }
    if (count < BLOCK) {
      for (int64_t k = i; k < BLOCK; ++k) m[k] = v[k] = 0.0f;
      if (i < count) adamw_8bit_lanes(step, factor, moments, weights, start + i, count - i, m + i, v + i);
    }
    moments.exp_avg_absmax[block] = quantize_block<true>(m, count, moments.signed_map, moments.exp_avg + start);
    moments.exp_avg_sq_absmax[block] =
        quantize_block<false>(v, count, moments.unsigned_map, moments.exp_avg_sq + start);
  }
}
