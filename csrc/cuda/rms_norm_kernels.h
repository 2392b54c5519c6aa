// RMS normalisation: launchers. T, of x, weight, y and their gradients, is float, Bf16 or Fp16; sums and rstd are fp32.
// What they write is contiguous.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

template <class T>
void rms_norm(Rows<const T> x, const T* weight, float eps, T* y, float* rstd, cudaStream_t stream);

// Into how many parts the sum over rows for dweight is cut: a function of the shape alone, and so is every bit of it.
int64_t rms_norm_dweight_parts(int64_t count, int64_t width);

// dresidual: what is added to dx once that is rounded; its data is null if there is none. dweight (width): null if not
// wanted. parts: memory for (rms_norm_dweight_parts, width).
template <class T>
void rms_norm_backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual,
                       T* dx, float* dweight, float* parts, cudaStream_t stream);

}  // namespace minift::cuda
