// Rotary position embedding: launcher. T is float, Bf16 or Fp16.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// Rotates the pairs (i, i + R) of every head, a row of 2 R elements, by the angle i of its token. cos and sin (tokens,
// R), y like x and contiguous; `inverse` turns by minus the angle.
template <class T>
void rope(Rows<const T> x, const float* cos, const float* sin, bool inverse, int64_t num_heads, T* y,
          cudaStream_t stream);

}  // namespace minift::cuda
