// A few tokens times an NF4 matrix: x (T, in), W (features, in), y (T, features) contiguous. T is float, Bf16 or Fp16.

#pragma once

#include "../nf4.h"
#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// x.width is a multiple of block_size, which is at least 32.
template <class T>
void nf4_gemv(Rows<const T> x, const uint8_t* codes, nf4::Scales scales, int64_t block_size, int64_t features, T* y,
              cudaStream_t stream);

}  // namespace minift::cuda
