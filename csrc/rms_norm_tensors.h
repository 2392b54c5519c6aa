// What RMS normalisation demands of its tensors on every device, and its outputs beside y.

#pragma once

#include "tensors.h"

#include <optional>

namespace minift {

inline void check_rms_norm(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1, "rms_norm: x must have at least one dimension");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1),
                  "rms_norm: weight must be one-dimensional and as long as the last dimension of x");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "rms_norm: weight must have the dtype of x");
}

inline void check_rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                    const std::optional<Tensor>& dresidual) {
  check_rms_norm(x, weight);
  check_same(dy, x, "rms_norm_backward: dy must have the shape and dtype of x");
  if (dresidual) check_same(*dresidual, x, "rms_norm_backward: dresidual must have the shape and dtype of x");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && rstd.is_contiguous(),
                  "rms_norm_backward: rstd must be contiguous float32, as rms_norm returns it");
  STD_TORCH_CHECK(rstd.numel() == row_layout(x).count,
                  "rms_norm_backward: rstd must have one element for every row of x");
}

// rstd, uninitialised: fp32 with the leading dimensions of x.
inline Tensor new_rstd(const Tensor& x) {
  torch::headeronly::IntHeaderOnlyArrayRef leading(x.sizes().data(), x.dim() - 1);
  return torch::stable::new_empty(x, leading, ScalarType::Float);
}

}  // namespace minift
