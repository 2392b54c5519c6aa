// The segmented low-rank product: launcher. T is float, Bf16 or Fp16.

#pragma once

#include "../rows.h"
#include "../sgmv.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// y (T, out) += (x Aᵀ) B in each of `count` segments, which are in the host's memory. A (R, in), B (R, out):
// contiguous. hidden: scratch for T rows of hidden_stride numbers, the largest rank.
template <class T>
void sgmv(Rows<const T> x, const T* A, const T* B, Rows<T> y, const SgmvSegment* segments, int64_t count,
          float* hidden, int64_t hidden_stride, cudaStream_t stream);

}  // namespace minift::cuda
