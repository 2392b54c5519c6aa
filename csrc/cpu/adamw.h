// One step's constants of an AdamW update, for the kernels with fp32 and with 8-bit moments.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

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

  AdamwStep(const std::optional<torch::stable::Tensor>& factor, double beta1, double beta2, double eps,
            double step_size, double keep, int64_t key, int64_t first);
};

// Raises unless these are 1-D, contiguous and of one length; grad must be fp32, master fp32 or bf16.
void check_master_and_grad(const torch::stable::Tensor& master, const torch::stable::Tensor& grad);

}  // namespace minift
