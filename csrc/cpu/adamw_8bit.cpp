// AdamW with 8-bit moments on the CPU: all tensors 1-D and contiguous, master fp32, bf16, or in halves.

#include "../adamw_8bit_tensors.h"
#include "../random_bits.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "adamw_8bit_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

void adamw_8bit(const Tensor& master, const Tensor& grad, const Tensor& exp_avg_codes, const Tensor& exp_avg_absmax,
                const Tensor& exp_avg_sq_codes, const Tensor& exp_avg_sq_absmax, const Tensor& signed_values,
                const Tensor& signed_buckets, const Tensor& unsigned_values, const Tensor& unsigned_buckets,
                const std::optional<Tensor>& lower, const std::optional<Tensor>& grad_factor, double beta1,
                double beta2, double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, lower);
  QuantizedMoments moments =
      quantized_moments(master, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax, signed_values,
                        signed_buckets, unsigned_values, unsigned_buckets);
  AdamwStep step = adamw_step(master, grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  int64_t numel = master.size(0);
  dispatch_weights(master, grad, lower, [&](auto weights) {
    auto* kernel = MINIFT_KERNEL(adamw_8bit<decltype(weights)>);
    parallel_rows(num_moment_blocks(master), BLOCK, [&](int64_t begin, int64_t end) {
      kernel(step, moments, weights, numel, begin, end);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit));
}

}  // namespace minift
