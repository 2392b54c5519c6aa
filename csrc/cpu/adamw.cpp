// AdamW with fp32 moments on the CPU: all tensors 1-D and contiguous, master fp32 or bf16.

#include "adamw.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "adamw_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {

AdamwStep::AdamwStep(const std::optional<Tensor>& factor, double beta1, double beta2, double eps, double step_size,
                     double keep, int64_t key, int64_t first)
    : beta1(float(beta1)),
      one_minus_beta1(float(1.0 - beta1)),
      beta2(float(beta2)),
      one_minus_beta2(float(1.0 - beta2)),
      eps(float(eps)),
      step_size(float(step_size)),
      keep(float(keep)),
      grad_factor(1.0f),
      key(static_cast<uint64_t>(key)),
      first(first) {
  if (!factor.has_value()) return;
  STD_TORCH_CHECK(factor->scalar_type() == ScalarType::Float && factor->numel() == 1,
                  "adamw: grad_factor must be one float32");
  grad_factor = *static_cast<const float*>(factor->data_ptr());
}

void check_weights(const Tensor& master, const Tensor& grad, const std::optional<Tensor>& wire) {
  STD_TORCH_CHECK(master.dim() == 1 && master.is_contiguous() &&
                      (master.scalar_type() == ScalarType::Float || master.scalar_type() == ScalarType::BFloat16),
                  "adamw: master must be 1-D contiguous float32 or bfloat16");
  STD_TORCH_CHECK(grad.dim() == 1 && grad.is_contiguous() && grad.scalar_type() == ScalarType::Float &&
                      grad.size(0) == master.size(0),
                  "adamw: grad must be contiguous float32 of the shape of master");
  if (!wire.has_value()) return;
  STD_TORCH_CHECK(wire->dim() == 1 && wire->is_contiguous() && wire->size(0) == master.size(0),
                  "adamw: wire must be contiguous and of the shape of master");
}

namespace {

void adamw(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
           const std::optional<Tensor>& wire, const std::optional<Tensor>& grad_factor, double beta1, double beta2,
           double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, wire);
  check_same(exp_avg, grad, "adamw: exp_avg must have the shape and dtype of grad");
  check_same(exp_avg_sq, grad, "adamw: exp_avg_sq must have the shape and dtype of grad");
  STD_TORCH_CHECK(exp_avg.is_contiguous() && exp_avg_sq.is_contiguous(), "adamw: moments must be contiguous");
  AdamwStep step(grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  float* m = static_cast<float*>(exp_avg.data_ptr());
  float* v = static_cast<float*>(exp_avg_sq.data_ptr());
  dispatch_weights(master, grad, wire, [&](auto weights) {
    auto* kernel = MINIFT_KERNEL(adamw<decltype(weights)>);
    parallel_rows(master.size(0), 1, [&](int64_t begin, int64_t end) { kernel(step, weights, m, v, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("adamw", TORCH_BOX(&adamw));
}

}  // namespace minift
