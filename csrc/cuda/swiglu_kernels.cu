// SwiGLU on the GPU, in fp32 and rounded once at the end. Bound by memory.

#include "swiglu_kernels.h"

#include "elementwise.h"
#include "swiglu_math.h"

namespace minift::cuda {
namespace {

struct Forward {
  __device__ void operator()(int64_t, const Pack (&inputs)[2], Pack (&outputs)[1]) const {
    const auto& [gate, up] = inputs;
#pragma unroll
    for (int i = 0; i < PACK; ++i) outputs[0].at[i] = swiglu_value(gate.at[i], up.at[i]);
  }
};

// The gradients of gate and up, and what forward gave where there is a third output.
template <int OUTPUTS>
struct Backward {
  __device__ void operator()(int64_t, const Pack (&inputs)[3], Pack (&outputs)[OUTPUTS]) const {
    const auto& [dy, gate, up] = inputs;
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      SwigluGradient gradient = swiglu_gradient(dy.at[i], gate.at[i], up.at[i]);
      outputs[0].at[i] = gradient.gate;
      outputs[1].at[i] = gradient.up;
      if constexpr (OUTPUTS == 3) outputs[2].at[i] = swiglu_value(gate.at[i], up.at[i]);
    }
  }
};

}  // namespace

template <class T>
void swiglu(Rows<const T> gate, Rows<const T> up, Rows<T> y, cudaStream_t stream) {
  launch_elementwise("swiglu", Elementwise<T, 2, 1>{{gate, up}, {y}}, Forward(), stream);
}

template <class T>
void swiglu_backward(Rows<const T> dy, Rows<const T> gate, Rows<const T> up, Rows<T> dgate, Rows<T> dup,
                     const Rows<T>* y, cudaStream_t stream) {
  if (y != nullptr) {
    Elementwise<T, 3, 3> tensors{{dy, gate, up}, {dgate, dup, *y}};
    launch_elementwise("swiglu_backward", tensors, Backward<3>(), stream);
  } else {
    Elementwise<T, 3, 2> tensors{{dy, gate, up}, {dgate, dup}};
    launch_elementwise("swiglu_backward", tensors, Backward<2>(), stream);
  }
}

#define INSTANTIATE(T)                                                                                          \
  template void swiglu(Rows<const T>, Rows<const T>, Rows<T>, cudaStream_t);                                    \
  template void swiglu_backward(Rows<const T>, Rows<const T>, Rows<const T>, Rows<T>, Rows<T>, const Rows<T>*, \
                                cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
