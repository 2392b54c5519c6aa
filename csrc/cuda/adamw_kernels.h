// AdamW: launchers. Weights<T, Wire>: T is float or Bf16, Wire float, Bf16 or Fp16.

#pragma once

#include "../adamw.h"
#include "../blockwise.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// DO(T, Wire) for all of them.
#define MINIFT_FOR_ALL_WEIGHTS(DO) \
  DO(float, float) DO(float, Bf16) DO(float, Fp16) DO(Bf16, float) DO(Bf16, Bf16) DO(Bf16, Fp16)

// n weights, and their moments.
template <class T, class Wire>
void adamw(const AdamwStep& step, Weights<T, Wire> weights, float* exp_avg, float* exp_avg_sq, int64_t n,
           cudaStream_t stream);

template <class T, class Wire>
void adamw_8bit(const AdamwStep& step, const QuantizedMoments& moments, Weights<T, Wire> weights, int64_t n,
                cudaStream_t stream);

}  // namespace minift::cuda
