// AdamW with fp32 moments on the CPU: all tensors 1-D and contiguous, master fp32, bf16, or in halves.

#include "../adamw_tensors.h"
#include "../random_bits.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "adamw_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

void adamw(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const std::optional<Tensor>& lower, const std::optional<Tensor>& grad_factor, double beta1, double beta2,
           double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, lower);
  check_moments(exp_avg, exp_avg_sq, grad);
  AdamwStep step = adamw_step(master, grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  float* m = static_cast<float*>(exp_avg.data_ptr());
  float* v = static_cast<float*>(exp_avg_sq.data_ptr());
  dispatch_weights(master, grad, lower, [&](auto weights) {
    auto* kernel = MINIFT_KERNEL(adamw<decltype(weights)>);
    parallel_rows(master.size(0), 1, [&](int64_t begin, int64_t end) { kernel(step, weights, m, v, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("adamw", TORCH_BOX(&adamw));
}

}  // namespace minift
