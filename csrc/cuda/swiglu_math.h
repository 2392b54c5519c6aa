// SwiGLU of one element, in fp32. Exponentials and divisions are IEEE's: kernels that call these wait for memory.

#pragma once

#include <cuda_runtime.h>

namespace minift::cuda {

// A reciprocal takes fewer instructions than a division, and where gradients are computed too it is the same one.
__device__ __forceinline__ float swiglu_value(float gate, float up) {
  return gate * (1.0f / (1.0f + expf(-gate))) * up;
}

struct SwigluGradient {
  float gate, up;
};

// With s = sigmoid(g): dup = dy g s, dgate = dy up s (1 + g (1 - s)).
// 1 - s is e^-g s, which does not cancel where s is near 1. Where e^-g is infinite s is 0, and so is dgate: the finite
// stand-in only keeps 0 * infinity away.
__device__ __forceinline__ SwigluGradient swiglu_gradient(float dy, float gate, float up) {
  constexpr float LARGEST = 0x1.fffffep127f;
  float e = expf(-gate), s = 1.0f / (1.0f + e);
  float one_minus_s = (e > LARGEST ? LARGEST : e) * s;
  return {dy * up * (s * (1.0f + gate * one_minus_s)), dy * (gate * s)};
}

}  // namespace minift::cuda
