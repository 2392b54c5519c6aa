// What AdamW updates and one step's constants, for the kernels with fp32 and with 8-bit moments.

#pragma once

#include "../random_bits.h"
#include "parallel.h"

#include <cstdint>
#include <optional>
#include <type_traits>

namespace minift {

struct AdamwStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;        // already times sqrt(1 - beta2^t)
  float step_size;  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
  float keep;       // 1 - lr * decay
  float grad_factor;
  // Stochastic rounding: where the parameter's random bits begin, and the number of the first element in it.
  uint64_t key;
  int64_t first;

  AdamwStep(const std::optional<Tensor>& factor, double beta1, double beta2, double eps, double step_size, double keep,
            int64_t key, int64_t first);
};

// T: fp32 or bf16. wire: where the new weights also go, in the dtype in which they are gathered, or null.
template <class T, class Wire>
struct Weights {
  T* master;
  const float* grad;
  Wire* wire;
};

// Raises unless these are 1-D, contiguous and of one length; grad must be fp32, master fp32 or bf16.
void check_weights(const Tensor& master, const Tensor& grad, const std::optional<Tensor>& wire);

// function(Weights<T, Wire>) with the element types of these tensors, which were checked.
template <class Function>
void dispatch_weights(const Tensor& master, const Tensor& grad, const std::optional<Tensor>& wire,
                      const Function& function) {
  const float* g = static_cast<const float*>(grad.data_ptr());
  auto with_master = [&](auto* weights) {
    using T = std::remove_pointer_t<decltype(weights)>;
    if (!wire.has_value()) return function(Weights<T, float>{weights, g, nullptr});
    dispatch_dtype(*wire, "adamw", [&](auto element) {
      function(Weights<T, decltype(element)>{weights, g, static_cast<decltype(element)*>(wire->data_ptr())});
    });
  };
  if (master.scalar_type() == ScalarType::Float) {
    with_master(static_cast<float*>(master.data_ptr()));
  } else {
    with_master(static_cast<Bf16*>(master.data_ptr()));
  }
}

}  // namespace minift
