// Cross entropy of rows of logits: launcher. T is float, Bf16 or Fp16.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

// losses (count). `need_gradient`: logits (count, width), contiguous, become softmax - one_hot. A target that is not in
// [0, width) makes its loss and its row NaN: nobody waits for the GPU to look at it.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, int64_t count, int64_t width, bool need_gradient, float* losses,
                   cudaStream_t stream);

}  // namespace minift::cuda
