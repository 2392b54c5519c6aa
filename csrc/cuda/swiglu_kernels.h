// y = silu(gate) * up and its gradients: launchers. T is float, Bf16 or Fp16.

#pragma once

#include "../rows.h"

#include <cuda_runtime.h>

namespace minift::cuda {

template <class T>
void swiglu(Rows<const T> gate, Rows<const T> up, Rows<T> y, cudaStream_t stream);

// y: where to put what forward gave, or null.
template <class T>
void swiglu_backward(Rows<const T> dy, Rows<const T> gate, Rows<const T> up, Rows<T> dgate, Rows<T> dup,
                     const Rows<T>* y, cudaStream_t stream);

}  // namespace minift::cuda
