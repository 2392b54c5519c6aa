// Between tensors and the AdamW kernels of every device: checks, and dispatch on the dtypes of weights.

#pragma once

#include "adamw.h"
#include "tensors.h"

#include <optional>

namespace minift {

inline AdamwStep adamw_step(const Tensor& master, const std::optional<Tensor>& grad_factor, double beta1, double beta2,
                            double eps, double step_size, double keep, int64_t key, int64_t first) {
  const float* factor = nullptr;
  if (grad_factor.has_value()) {
    STD_TORCH_CHECK(grad_factor->scalar_type() == ScalarType::Float && grad_factor->numel() == 1 &&
                        grad_factor->get_device() == master.get_device(),
                    "adamw: grad_factor must be one float32, on the device of master");
    factor = static_cast<const float*>(grad_factor->data_ptr());
  }
  return {float(beta1), float(1.0 - beta1), float(beta2), float(1.0 - beta2),         float(eps),
          float(step_size), float(keep),    factor,       static_cast<uint64_t>(key), first};
}

// Raises unless these are 1-D, contiguous and of one length; grad must be fp32, master fp32 or bf16, lower int16 beside
// a bf16 master.
inline void check_weights(const Tensor& master, const Tensor& grad, const std::optional<Tensor>& lower) {
  STD_TORCH_CHECK(master.dim() == 1 && master.is_contiguous() &&
                      (master.scalar_type() == ScalarType::Float || master.scalar_type() == ScalarType::BFloat16),
                  "adamw: master must be 1-D contiguous float32 or bfloat16");
  STD_TORCH_CHECK(grad.dim() == 1 && grad.is_contiguous() && grad.scalar_type() == ScalarType::Float &&
                      grad.size(0) == master.size(0),
                  "adamw: grad must be contiguous float32 of the shape of master");
  if (!lower.has_value()) return;
  STD_TORCH_CHECK(lower->dim() == 1 && lower->is_contiguous() && lower->scalar_type() == ScalarType::Short &&
                      lower->size(0) == master.size(0) && master.scalar_type() == ScalarType::BFloat16,
                  "adamw: lower must be contiguous int16 of the shape of a bfloat16 master");
}

inline void check_moments(const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad) {
  check_same(exp_avg, grad, "adamw: exp_avg must have the shape and dtype of grad");
  check_same(exp_avg_sq, grad, "adamw: exp_avg_sq must have the shape and dtype of grad");
  STD_TORCH_CHECK(exp_avg.is_contiguous() && exp_avg_sq.is_contiguous(), "adamw: moments must be contiguous");
}

// function(Weights<...>) as these tensors, which were checked, hold them.
template <class Function>
void dispatch_weights(const Tensor& master, const Tensor& grad, const std::optional<Tensor>& lower,
                      const Function& function) {
  const float* g = static_cast<const float*>(grad.data_ptr());
  void* m = master.data_ptr();
  if (master.scalar_type() == ScalarType::Float) {
    function(Weights<float>{static_cast<float*>(m), g, nullptr});
  } else if (!lower.has_value()) {
    function(Weights<Bf16>{static_cast<Bf16*>(m), g, nullptr});
  } else {
    function(Weights<Bf16, true>{static_cast<Bf16*>(m), g, static_cast<uint16_t*>(lower->data_ptr())});
  }
}

}  // namespace minift
