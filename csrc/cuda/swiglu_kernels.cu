// SwiGLU on the GPU, in fp32 and rounded once at the end. Bound by memory: exponentials and divisions are IEEE's.

#include "swiglu_kernels.h"

#include "elementwise.h"

namespace minift::cuda {
namespace {

struct Forward {
  __device__ void operator()(int64_t, const Pack (&inputs)[2], Pack (&outputs)[1]) const {
    const auto& [gate, up] = inputs;
#pragma unroll
    for (int i = 0; i < PACK; ++i) outputs[0].at[i] = gate.at[i] / (1.0f + expf(-gate.at[i])) * up.at[i];
  }
};

// With s = sigmoid(g): dup = dy g s, dgate = dy up s (1 + g (1 - s)).
// 1 - s is e^-g s, which does not cancel where s is near 1. Where e^-g is infinite s is 0, and so is dgate: the finite
// stand-in only keeps 0 * infinity away.
struct Backward {
  __device__ void operator()(int64_t, const Pack (&inputs)[3], Pack (&outputs)[2]) const {
    constexpr float LARGEST = 0x1.fffffep127f;
    const auto& [dy, gate, up] = inputs;
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      float g = gate.at[i], e = expf(-g), s = 1.0f / (1.0f + e);
      float one_minus_s = (e > LARGEST ? LARGEST : e) * s;
      outputs[0].at[i] = dy.at[i] * up.at[i] * (s * (1.0f + g * one_minus_s));
      outputs[1].at[i] = dy.at[i] * (g * s);
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
                     cudaStream_t stream) {
  launch_elementwise("swiglu_backward", Elementwise<T, 3, 2>{{dy, gate, up}, {dgate, dup}}, Backward(), stream);
}

#define INSTANTIATE(T)                                                                                         \
  template void swiglu(Rows<const T>, Rows<const T>, Rows<T>, cudaStream_t);                                   \
  template void swiglu_backward(Rows<const T>, Rows<const T>, Rows<const T>, Rows<T>, Rows<T>, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
