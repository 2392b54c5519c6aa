// AdamW on the GPU, with fp32 and with 8-bit moments: all tensors 1-D and contiguous, master fp32, bf16, or in halves.

#include "../adamw_8bit_tensors.h"

#include "adamw_kernels.h"
#include "tensors.h"

namespace minift::cuda {
namespace {

void adamw_op(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const std::optional<Tensor>& lower, const std::optional<Tensor>& grad_factor, double beta1, double beta2,
              double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, lower);
  check_moments(exp_avg, exp_avg_sq, grad);
  AdamwStep step = adamw_step(master, grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  OnDevice on(master, grad, exp_avg, exp_avg_sq, lower, grad_factor);
  dispatch_weights(master, grad, lower, [&](auto weights) {
    adamw(step, weights, static_cast<float*>(exp_avg.data_ptr()), static_cast<float*>(exp_avg_sq.data_ptr()),
          master.size(0), on.stream);
  });
}

void adamw_8bit_op(const Tensor& master, const Tensor& grad, const Tensor& exp_avg_codes, const Tensor& exp_avg_absmax,
                   const Tensor& exp_avg_sq_codes, const Tensor& exp_avg_sq_absmax, const Tensor& signed_values,
                   const Tensor& signed_buckets, const Tensor& unsigned_values, const Tensor& unsigned_buckets,
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& grad_factor, double beta1,
                   double beta2, double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, lower);
  QuantizedMoments moments =
      quantized_moments(master, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax, signed_values,
                        signed_buckets, unsigned_values, unsigned_buckets);
  AdamwStep step = adamw_step(master, grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  OnDevice on(master, grad, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax, signed_values,
              signed_buckets, unsigned_values, unsigned_buckets, lower, grad_factor);
  dispatch_weights(master, grad, lower,
                   [&](auto weights) { adamw_8bit(step, moments, weights, master.size(0), on.stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("adamw", TORCH_BOX(&adamw_op));
  m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit_op));
}

}  // namespace minift::cuda
