// Quantising to NF4 and back: launchers. T is float, Bf16 or Fp16; the format: ../nf4.h.

#pragma once

#include "../nf4.h"
#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// absmax of every block of n elements, and codes unless null.
template <class T>
void nf4_quantize(const T* weight, int64_t n, int64_t block_size, uint8_t* codes, float* absmax, cudaStream_t stream);

// Element i of row r of `out` (rows, width) becomes element start + r * stride + i of the weight.
template <class T>
void nf4_dequantize(const uint8_t* codes, nf4::Scales scales, int64_t block_size, T* out, int64_t rows, int64_t width,
                    int64_t start, int64_t stride, cudaStream_t stream);

}  // namespace minift::cuda
