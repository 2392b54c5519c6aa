// Dropout: launcher. T is float, Bf16 or Fp16.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// y = x where the element's 16 random bits are num_dropped or more, else 0.
template <class T>
void dropout(Rows<const T> x, uint64_t seed, uint32_t num_dropped, Rows<T> y, cudaStream_t stream);

}  // namespace minift::cuda
