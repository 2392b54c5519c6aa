// What AdamW updates and one step's constants, for the kernels with fp32 and with 8-bit moments, on every device.

#pragma once

#include "rows.h"

#include <cstdint>

namespace minift {

struct AdamwStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;                 // already times sqrt(1 - beta2^t)
  float step_size;           // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float keep;                // 1 - lr * decay
  const float* grad_factor;  // in the memory of the device, where kernels read it; null: 1
  // Stochastic rounding: where the parameter's random bits begin, and the number of the first element in it.
  uint64_t key;
  int64_t first;

  MINIFT_HOST_DEVICE float factor() const { return grad_factor == nullptr ? 1.0f : *grad_factor; }
};

// A kernel whose factor is not finite writes nothing: who launched it did not know yet whether there is a step.
MINIFT_HOST_DEVICE bool is_finite(float factor) { return factor * 0.0f == 0.0f; }

// Weights are fp32 (T is float), bf16 that is rounded stochastically (T is Bf16), or fp32 in two halves: `master` has
// the bf16 nearest to each, `lower` the 16 bits that it lacks (minift/ops/halves.py).
template <class T, bool IN_HALVES = false>
struct Weights {
  T* master;
  const float* grad;
  uint16_t* lower;  // null, unless IN_HALVES
};

}  // namespace minift
