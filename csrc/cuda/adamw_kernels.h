// AdamW: launchers.

#pragma once

#include "../adamw.h"
#include "../blockwise.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// DO(T, IN_HALVES) for all there are.
#define MINIFT_FOR_ALL_WEIGHTS(DO) DO(float, false) DO(Bf16, false) DO(Bf16, true)

// n weights, and their moments.
template <class T, bool IN_HALVES>
void adamw(const AdamwStep& step, Weights<T, IN_HALVES> weights, float* exp_avg, float* exp_avg_sq, int64_t n,
           cudaStream_t stream);

template <class T, bool IN_HALVES>
void adamw_8bit(const AdamwStep& step, const QuantizedMoments& moments, Weights<T, IN_HALVES> weights, int64_t n,
                cudaStream_t stream);

}  // namespace minift::cuda
